"""Upsampling by differences is the convolution of the doubled map."""

import pytest
import torch
import torch.nn.functional as F

from helpers.maps import LAST, drawn
from var_exp.ops import upsampling
from var_exp.ops.upsampling import Upsample, upsample_by_differences


def exact(x, weight, bias):
    doubled = x.double().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(doubled, weight.double(), bias.double(), padding=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (7, 3), (16, 32)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 3), (16, 32)], ids=str)
@torch.no_grad()
def test_by_differences_it_is_the_convolution_of_the_doubled_map(channels, size):
    x, weight, bias = drawn(3, *channels, *size)
    out = upsample_by_differences(x, weight, bias)
    assert out.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out, exact(x, weight, bias).float(), atol=1e-5, rtol=1e-5)
    alone = upsample_by_differences(x[1:2], weight, bias)
    assert torch.equal(alone, out[1:2])  # whatever comes with it


@torch.no_grad()
def test_in_float32_it_errs_less_than_twice_as_much_as_a_transposed_convolution():
    x, weight, bias = drawn(1, 160, 160, 32, 32)
    expected = exact(x, weight, bias)
    transposed = F.conv_transpose2d(x, upsampling.folded(weight), bias, stride=2, padding=1)
    ours = upsample_by_differences(x, weight, bias)
    assert (ours - expected).norm() < 2 * (transposed - expected).norm()


@torch.no_grad()
def test_in_bfloat16_it_errs_on_noise_less_than_four_times_as_much_as_rounding_does():
    x, weight, bias = drawn(1, 160, 160, 32, 32, torch.bfloat16)
    expected = exact(x, weight, bias)
    error = (upsample_by_differences(x, weight, bias).double() - expected).norm()
    assert error < 4 * (expected.bfloat16() - expected).norm()


@pytest.fixture
def by_differences(monkeypatch):
    """The dtypes of each call of `upsample_by_differences`."""
    seen, compute = [], upsampling.upsample_by_differences

    def spy(x, *others):
        seen.append(x.dtype)
        return compute(x, *others)

    monkeypatch.setattr(upsampling, "upsample_by_differences", spy)
    return seen


@torch.no_grad()
def test_many_channels_go_by_differences_in_the_precision_that_is_asked_for(by_differences):
    layer, (x, *_) = Upsample(128), drawn(2, 128, 1, 6, 4)
    expected = exact(x, layer.conv.weight, layer.conv.bias)
    torch.testing.assert_close(layer(x), expected.float(), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.01 * expected.norm()
    assert by_differences == [torch.float32, torch.bfloat16]


def test_others_are_left_to_a_transposed_convolution(by_differences):
    layer, (x, *_) = Upsample(128), drawn(1, 128, 1, 4, 4)
    found = layer(x)
    found.sum().backward()  # asked for gradients
    assert layer.conv.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x.contiguous()), found)
        few, (y, *_) = Upsample(8), drawn(1, 8, 1, 4, 4)
        torch.testing.assert_close(few(y), few.conv(F.interpolate(y, scale_factor=2.0)))
    assert by_differences == []
