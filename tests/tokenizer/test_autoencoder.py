"""The autoencoder is the published one, written out here block by block."""

import pytest
import torch
import torch.nn.functional as F

from var_exp.tokenizer import Decoder, Encoder
from var_exp.tokenizer.autoencoder import (
    Downsample,
    ResidualBlock,
    SpatialAttention,
    Upsample,
    group_norm,
)


def slow_norm(x, norm):
    """Group normalisation, a group at a time."""
    parts = []
    for part in x.chunk(norm.num_groups, dim=1):
        mean = part.mean(dim=(1, 2, 3), keepdim=True)
        var = part.var(dim=(1, 2, 3), keepdim=True, correction=0)
        parts.append((part - mean) / (var + 1e-6).sqrt())
    return torch.cat(parts, 1) * norm.weight[:, None, None] + norm.bias[:, None, None]


def stirred(module):
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(8, 8), (8, 12)])
def test_a_residual_block_is_two_normed_convolutions_added_to_the_raw_input(
    in_channels, out_channels
):
    block = stirred(ResidualBlock(in_channels, out_channels, dropout=0.5))
    x = torch.randn(2, in_channels, 5, 4)
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = slow_norm(h, norm)
        h = F.conv2d(h * h.sigmoid(), conv.weight, conv.bias, padding=1)
    raw = x
    if in_channels != out_channels:
        weight = block.nin_shortcut.weight[:, :, 0, 0]
        raw = torch.einsum("oi,bihw->bohw", weight, x)
        raw = raw + block.nin_shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), raw + h, atol=1e-4, rtol=1e-4)


def test_attention_mixes_all_places_with_one_head():
    attention = stirred(SpatialAttention(8))
    x = torch.randn(2, 8, 3, 4)
    normed = slow_norm(x, attention.norm).flatten(2)  # (B, C, HW)
    weight, bias = attention.qkv.weight[:, :, 0, 0], attention.qkv.bias[:, None]
    q, k, v = (weight @ normed + bias).split(8, dim=1)
    shares = (q.transpose(1, 2) @ k * 8**-0.5).softmax(dim=-1)  # (B, HW, HW)
    mixed = (v @ shares.transpose(1, 2)).view_as(x)
    proj = attention.proj_out
    expected = x + F.conv2d(mixed, proj.weight, proj.bias)
    torch.testing.assert_close(attention(x), expected, atol=1e-4, rtol=1e-4)


def test_downsampling_pads_on_the_right_and_at_the_bottom():
    down = Downsample(2)
    x = torch.randn(1, 2, 4, 6)
    padded = torch.zeros(1, 2, 5, 7)
    padded[:, :, :4, :6] = x
    expected = torch.zeros(1, 2, 2, 3)
    for i in range(2):
        for j in range(3):
            patch = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[0, :, i, j] = (down.conv.weight * patch).sum(dim=(1, 2, 3)) + down.conv.bias
    torch.testing.assert_close(down(x), expected)


def test_upsampling_repeats_pixels_before_the_convolution():
    up = Upsample(2)
    x = torch.randn(1, 2, 3, 2)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), up.conv(repeated))


@pytest.mark.parametrize(("channels", "groups"), [(160, 32), (32, 32), (48, 16), (8, 8), (3, 1)])
def test_group_norm_has_32_groups_where_they_divide_the_channels(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups and norm.eps == 1e-6


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2), (1, 1, 1, 2, 2)])
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
@torch.no_grad()
def test_the_stride_is_two_for_each_resolution_after_the_first(multipliers, size):
    sizes = {"code_dim": 4, "width": 4, "multipliers": multipliers, "num_res_blocks": 1}
    encoder, decoder = Encoder(1, **sizes), Decoder(1, **sizes)
    stride = 2 ** (len(multipliers) - 1)
    assert encoder.stride == stride
    z = encoder(torch.randn(2, 1, *size))
    assert z.shape == (2, 4, size[0] // stride, size[1] // stride)
    assert decoder(z).shape == (2, 1, *size)


def test_attention_sits_after_each_block_of_the_lowest_level_and_in_the_middle():
    with torch.device("meta"):
        networks = Encoder(3), Decoder(3), Encoder(3, attention=False), Decoder(3, attention=False)
    places = [
        sorted(name for name, m in network.named_modules() if isinstance(m, SpatialAttention))
        for network in networks
    ]
    assert places[0] == ["down.4.attn.0", "down.4.attn.1", "mid.attn_1"]
    assert places[1] == ["mid.attn_1", "up.4.attn.0", "up.4.attn.1", "up.4.attn.2"]
    assert places[2] == places[3] == []


@torch.no_grad()
def test_the_decoders_levels_run_from_the_last_to_the_first_which_does_not_upsample():
    sizes = {"code_dim": 4, "width": 4, "multipliers": (1, 2, 4), "num_res_blocks": 1}
    decoder, met = Decoder(3, **sizes), []
    for i, level in enumerate(decoder.up):
        level.register_forward_hook(
            lambda _module, inputs, output, i=i: met.append((i, inputs[0].shape, output.shape))
        )
    decoder(torch.randn(1, 4, 2, 2))
    assert [(i, before[1:], after[1:]) for i, before, after in met] == [
        (2, (16, 2, 2), (16, 4, 4)),
        (1, (16, 4, 4), (8, 8, 8)),
        (0, (8, 8, 8), (4, 8, 8)),
    ]
    assert sorted(n for n, m in decoder.named_modules() if isinstance(m, Upsample)) == [
        "up.1.upsample",
        "up.2.upsample",
    ]


@torch.no_grad()
def test_the_number_of_blocks_can_differ_from_resolution_to_resolution():
    sizes = {"code_dim": 4, "width": 4, "multipliers": (1, 2, 2), "num_res_blocks": [0, 2, 1]}
    encoder, decoder = Encoder(3, **sizes), Decoder(3, **sizes)
    assert [len(level.block) for level in encoder.down] == [0, 2, 1]
    assert [len(level.block) for level in decoder.up] == [1, 3, 2]
    assert decoder(encoder(torch.randn(1, 3, 8, 8))).shape == (1, 3, 8, 8)


@torch.no_grad()
def test_a_patch_size_folds_pixels_into_channels_and_widens_the_stride():
    sizes = {"code_dim": 4, "width": 4, "multipliers": (1, 2), "num_res_blocks": 1}
    encoder, decoder = Encoder(3, **sizes, patch_size=2), Decoder(3, **sizes, patch_size=2)
    assert encoder.stride == 4
    images = torch.randn(2, 3, 8, 16)
    assert encoder(images).shape == (2, 4, 2, 4)
    assert decoder(encoder(images)).shape == images.shape
    # A pixel of the image is one channel of its patch.
    met = []
    encoder.conv_in.register_forward_pre_hook(lambda _module, inputs: met.append(inputs[0]))
    encoder(images)
    for i, j in ((0, 0), (3, 5), (7, 14)):
        patch = met[0][:, :, i // 2, j // 2].view(2, 3, 2, 2)
        assert torch.equal(patch[:, :, i % 2, j % 2], images[:, :, i, j])


@pytest.mark.parametrize("network", [Encoder, Decoder])
@pytest.mark.parametrize("num_res_blocks", [[1, 1], [1, 0, 1], [1, 1, -1], [1, 1, 1, 1]])
def test_blocks_that_do_not_fit_the_resolutions_are_refused(network, num_res_blocks):
    with pytest.raises(ValueError, match="num_res_blocks must be") as error:
        network(3, 4, 4, (1, 2, 2), num_res_blocks)
    assert str(num_res_blocks) in str(error.value)


def test_dropout_acts_in_training_only():
    encoder = Encoder(1, code_dim=4, width=4, multipliers=(1,), num_res_blocks=1, dropout=0.5)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(encoder.train()(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))


@pytest.mark.parametrize("make", [Encoder, Decoder])
def test_without_gradients_wide_networks_compute_the_same_channels_last(make, monkeypatch):
    monkeypatch.setattr("var_exp.ops.convolution.WIDE", 32)
    network = make(code_dim=8, width=32, multipliers=(1, 2), num_res_blocks=1).eval()
    x = torch.randn(2, 3 if make is Encoder else 8, 8, 12)
    seen = []
    network.conv_in.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    slow = network(x).detach()
    with torch.no_grad():
        fast = network(x)
    layouts = [s.is_contiguous(memory_format=torch.channels_last) for s in seen]
    assert layouts == [False, True]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
