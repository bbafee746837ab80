"""Winograd's convolution is the convolution, and runs only where it is faster."""

import pytest
import torch
import torch.nn.functional as F

from helpers.maps import LAST, drawn
from var_exp.ops import convolution
from var_exp.ops.convolution import Conv2d, conv2d_winograd


def conv3x3(in_channels, out_channels):
    return Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@pytest.mark.parametrize("size", [(4, 1), (8, 4), (12, 7), (64, 32), (68, 3), (140, 4)], ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (5, 3), (16, 32)], ids=str)
@pytest.mark.parametrize("strip", [convolution.STRIP, 64])
@torch.no_grad()
def test_winograd_is_the_convolution(strip, channels, size, monkeypatch):
    monkeypatch.setattr(convolution, "STRIP", strip)
    x, weight, bias = drawn(3, *channels, *size)
    out, expected = conv2d_winograd(x, weight, bias), exact(x, weight, bias)
    assert out.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(out, expected.float(), atol=3e-5, rtol=1e-5)
    alone = conv2d_winograd(x[1:2], weight, bias)
    assert torch.equal(alone, out[1:2])  # whatever comes with it


@torch.no_grad()
def test_in_float32_it_errs_less_than_three_times_as_much_as_the_plain_convolution():
    x, weight, bias = drawn(1, 160, 160, 64, 64)
    expected = exact(x, weight, bias)
    ours, plain = conv2d_winograd(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    assert (ours - expected).norm() < 3 * (plain - expected).norm()


@torch.no_grad()
def test_in_bfloat16_it_errs_on_noise_less_than_eight_times_as_much_as_rounding_does():
    x, weight, bias = drawn(1, 160, 160, 64, 64, torch.bfloat16)
    weight = weight.bfloat16().float()
    expected = exact(x, weight, bias)
    error = (conv2d_winograd(x, weight, bias).double() - expected).norm()
    assert error < 8 * (expected.bfloat16() - expected).norm()


@pytest.fixture
def winograd(monkeypatch):
    """The images of each call of `conv2d_winograd`."""
    seen, compute = [], convolution.conv2d_winograd

    def spy(x, *others):
        seen.append((len(x), x.dtype))
        return compute(x, *others)

    monkeypatch.setattr(convolution, "conv2d_winograd", spy)
    return seen


@torch.no_grad()
def test_large_maps_of_many_channels_use_winograd_in_the_precision_of_autocast(winograd):
    layer, (x, *_) = conv3x3(128, 160), drawn(2, 128, 1, 64, 64)
    expected = exact(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected.float(), atol=3e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = [layer(x.bfloat16())]
    with torch.device("meta"):  # where nothing of it may be made
        found.append(layer.bfloat16()(x.bfloat16()))
    for out in found:
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < 0.02 * expected.norm()
    assert winograd == [(2, torch.float32), (2, torch.bfloat16), (2, torch.bfloat16)]


def test_all_others_are_left_to_torch(winograd):
    layer, (x, *_) = conv3x3(128, 128), drawn(1, 128, 1, 64, 64)
    layer(x).sum().backward()  # asked for gradients
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(drawn(1, 128, 1, 66, 64)[0])  # height not a multiple of 4
        layer(x[:, :, :60])  # a small map
        conv3x3(128, 3)(x)
        Conv2d(128, 128, kernel_size=3)(x)
        Conv2d(128, 128, kernel_size=3, stride=2, padding=1)(x)
        conv3x3(128, 128).double()(x.double())
        with pytest.raises(RuntimeError, match="channels"):
            conv3x3(130, 130)(x)
        assert conv3x3(128, 128)(x[0]).shape == x[0].shape  # no batch
        with pytest.raises(RuntimeError, match="type"):
            layer(x.bfloat16())
        layer.to("meta")(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert conv3x3(128, 128)(x).dtype == torch.bfloat16  # cast by torch
        with torch.autocast("cpu", torch.float16):
            assert conv3x3(128, 128)(x).dtype == torch.float16
    assert winograd == []


def test_the_weights_have_the_names_and_the_start_of_a_plain_layer():
    torch.manual_seed(0)
    ours = conv3x3(6, 5).state_dict()
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 5, 3, padding=1).state_dict()
    assert list(ours) == list(plain) and all(torch.equal(ours[k], plain[k]) for k in plain)
