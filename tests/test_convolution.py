"""Minimal filtering is a convolution, is taken where it pays, and changes nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from var_exp.tokenizer import Decoder, Encoder, convolution
from var_exp.tokenizer.convolution import Conv3x3, arranged, conv3x3_winograd, winograd_pays

WIDE = convolution.MIN_CHANNELS


@pytest.fixture
def everywhere(monkeypatch):
    """Minimal filtering wherever its form allows it."""
    monkeypatch.setattr(convolution, "MIN_CHANNELS", 1)
    monkeypatch.setattr(convolution, "MIN_PLACES", 1)


def drawn(b, i, o, h, w):
    x, weight = torch.randn(b, i, h, w), torch.randn(o, i, 3, 3) / (9 * i) ** 0.5
    return x, weight, torch.randn(o)


@pytest.mark.parametrize("channels", [(5, 3), (16, 24)])
@pytest.mark.parametrize("size", [(4, 4), (8, 20), (36, 12)])
@pytest.mark.parametrize("bytes_at_once", [1, 2**14, 2**30])
def test_minimal_filtering_equals_torchs_convolution(monkeypatch, channels, size, bytes_at_once):
    monkeypatch.setattr(convolution, "BYTES_AT_ONCE", bytes_at_once)
    x, weight, bias = drawn(2, *channels, *size)
    slow = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        fast = conv3x3_winograd(x.contiguous(memory_format=layout), weight, bias)
        assert fast.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast, slow.float(), atol=2e-5 * float(slow.abs().max()), rtol=0)


def test_an_image_is_filtered_alike_in_any_batch():
    x, weight, bias = drawn(5, 16, 8, 12, 8)
    together = conv3x3_winograd(x, weight, bias)
    for i in range(5):
        assert torch.equal(conv3x3_winograd(x[i : i + 1], weight, bias)[0], together[i])


def test_it_is_taken_without_gradients_in_float32_for_wide_and_large_maps_alone():
    x, weight, _ = drawn(1, WIDE, WIDE, 64, 64)
    assert not winograd_pays(x, weight)  # gradients are on
    with torch.no_grad():
        assert winograd_pays(x, weight)
        assert not winograd_pays(x.bfloat16(), weight.bfloat16())
        assert not winograd_pays(x.to("meta"), weight.to("meta"))
        assert not winograd_pays(x[..., :60, :60], weight)  # few places
        assert not winograd_pays(x[..., :63], weight)  # no whole tiles
        assert not winograd_pays(x, weight[: WIDE - 1])
        assert not winograd_pays(x, weight[:, : WIDE - 1])
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd_pays(x, weight)


@pytest.mark.parametrize("make", [Encoder, Decoder])
@torch.no_grad()
def test_networks_compute_with_it_what_they_compute_with_gradients(everywhere, make, monkeypatch):
    network = make(code_dim=8, width=32, multipliers=(1, 2), num_res_blocks=1)
    size = (16, 8) if make is Encoder else (8, 4)
    x = torch.randn(2, 3 if make is Encoder else 8, *size)
    calls = []
    fast_way = convolution.conv3x3_winograd
    monkeypatch.setattr(
        convolution, "conv3x3_winograd", lambda *args: calls.append(1) or fast_way(*args)
    )
    fast = network(x)
    with torch.enable_grad():
        slow = network(x)
    assert calls and fast.shape == slow.shape
    torch.testing.assert_close(fast, slow.detach(), atol=1e-4, rtol=1e-4)


def test_parameters_are_those_of_torchs_convolution():
    ours, theirs = Conv3x3(4, 6), nn.Conv2d(4, 6, kernel_size=3, padding=1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 7)
    assert torch.equal(ours(x), theirs(x))


def test_maps_of_wide_networks_are_channels_last_without_gradients_alone():
    x = torch.randn(2, 4, 8, 8)
    assert arranged(x, WIDE).is_contiguous()
    with torch.no_grad():
        assert arranged(x, WIDE).is_contiguous(memory_format=torch.channels_last)
        assert arranged(x, WIDE - 1) is x
