"""Upsampling with its convolution is the convolution of the upsampled map."""

import pytest
import torch
import torch.nn.functional as F

from helpers.maps import LAST, drawn
from var_exp.ops import upsampling
from var_exp.ops.upsampling import upsample_by_differences, upsample_conv2d


def plain(x, weight, bias):
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return F.conv2d(doubled, weight, bias, padding=1)


def exact(*tensors):
    return plain(*(tensor.double() for tensor in tensors))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (7, 3), (16, 32)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 3), (16, 32)], ids=str)
@torch.no_grad()
def test_by_differences_it_is_the_convolution_of_the_upsampled_map(channels, size):
    x, weight, bias = drawn(3, *channels, *size)
    out = upsample_by_differences(x, weight, bias)
    assert out.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out, exact(x, weight, bias).float(), atol=1e-5, rtol=1e-5)
    alone = upsample_by_differences(x[1:2], weight, bias)
    assert torch.equal(alone, out[1:2])  # whatever comes with it


@torch.no_grad()
def test_in_float32_it_errs_less_than_three_times_as_much_as_the_plain_way():
    x, weight, bias = drawn(1, 160, 160, 32, 32)
    expected = exact(x, weight, bias)
    ours = upsample_by_differences(x, weight, bias)
    assert (ours - expected).norm() < 3 * (plain(x, weight, bias) - expected).norm()


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
def test_many_channels_go_by_differences_in_the_precision_of_the_map(by_differences):
    x, weight, bias = drawn(2, 128, 128, 6, 4)
    expected = exact(x, weight, bias)
    for given in (x, x.contiguous()):
        out = upsample_conv2d(given, weight, bias)
        torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = upsample_conv2d(x.bfloat16(), weight, bias)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.01 * expected.norm()
    assert by_differences == [torch.float32, torch.float32, torch.bfloat16]


def test_few_channels_and_gradients_take_the_plain_way(by_differences):
    wide, few = drawn(1, 128, 128, 4, 4), drawn(1, 8, 8, 4, 4)
    wide[1].requires_grad_()
    upsample_conv2d(*wide).sum().backward()
    assert wide[1].grad is not None
    with torch.no_grad():
        torch.testing.assert_close(upsample_conv2d(*few), plain(*few))
    assert by_differences == []
