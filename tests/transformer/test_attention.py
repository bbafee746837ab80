"""Attention is the softmax written out, and a cache changes nothing but the time it takes."""

import cmath
import functools
import math

import pytest
import torch

from helpers.tiny import ODD_SCALES, SCALES, stir
from var_exp.ops.attention import attend_masked
from var_exp.scales import ScaleSchedule
from var_exp.transformer import KVCache
from var_exp.transformer.attention import SelfAttention
from var_exp.transformer.rope import rotation_table

WIDTH, HEADS, HEAD_DIM = 24, 3, 8
ALL = {"five": SCALES, **ODD_SCALES}
to_all = functools.partial(attend_masked, None)


def attention(qk_norm, **others):
    return stir(SelfAttention(WIDTH, HEADS, qk_norm, **others)).eval()


def masked(levels):
    """Attention under the dense mask of these levels."""
    return functools.partial(attend_masked, levels[:, None] >= levels[None, :])


def turned(vectors, places):
    """Pairs of channels as complex numbers, turned one by one: vectors (n, E), places (n, 2)."""
    out = vectors.clone()
    for i, (row, column) in enumerate(places.tolist()):
        for pair in range(HEAD_DIM // 2):
            axis, step = (row, pair) if pair < HEAD_DIM // 4 else (column, pair - HEAD_DIM // 4)
            angle = axis / 100 ** (step / (HEAD_DIM / 4))
            real, imaginary = vectors[i, 2 * pair : 2 * pair + 2].tolist()
            product = complex(real, imaginary) * cmath.exp(1j * angle)
            out[i, 2 * pair], out[i, 2 * pair + 1] = product.real, product.imag
    return out


def slow_attention(module, x, levels, key_bias=None, places=None):
    """Each query alone, head by head, in float64."""
    qkv = x.double() @ module.qkv.weight.double().T  # (B, L, 3C)
    q, k, v = qkv.split(WIDTH, dim=-1)
    q, v = q + module.q_bias, v + module.v_bias
    k = k if key_bias is None else k + key_bias
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            for i, level in enumerate(levels):
                query, scale = q[b, i, part], module.scale
                keys, values = k[b, levels <= level, part], v[b, levels <= level, part]
                if module.log_scale is not None:
                    query, keys = query / query.norm(), keys / keys.norm(dim=1, keepdim=True)
                    scale = min(math.exp(module.log_scale[0, head, 0, 0]), 100.0)
                if places is not None:
                    query = turned(query[None], places[i : i + 1])[0]
                    keys = turned(keys, places[levels <= level])
                out[b, i, part] = (scale * keys @ query).softmax(0) @ values
    return out @ module.proj.weight.double().T + module.proj.bias


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("softmax_scale", [1.0, 0.25])
@torch.no_grad()
def test_masked_attention_is_the_written_out_softmax_over_coarser_and_equal_scales(
    qk_norm, softmax_scale
):
    module = attention(qk_norm, softmax_scale=softmax_scale)
    levels = ScaleSchedule([1, 2, 3]).level_ids()
    x = torch.randn(2, len(levels), WIDTH)
    out = module(x, masked(levels))
    expected = slow_attention(module, x, levels).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patch_nums", [[1, 2, 3], [[1, 2], [2, 3]]], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_rotary_attention_is_that_of_queries_and_keys_turned_one_by_one(qk_norm, patch_nums):
    module, schedule = attention(qk_norm), ScaleSchedule(patch_nums)
    levels, (height, width) = schedule.level_ids(), schedule.latent_size
    centres = [
        ((i + 0.5) * height / h, (j + 0.5) * width / w)
        for h, w in schedule.sizes
        for i in range(h)
        for j in range(w)
    ]
    x = torch.randn(2, len(levels), WIDTH)
    out = module(x, masked(levels), rotation_table(schedule, HEAD_DIM))
    expected = slow_attention(module, x, levels, places=torch.tensor(centres)).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, module(x, masked(levels)), atol=1e-3)


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_scale_by_scale_with_the_cache_equals_all_at_once_without(patch_nums, qk_norm):
    module, schedule = attention(qk_norm), ScaleSchedule(patch_nums)
    levels = schedule.level_ids()
    x = torch.randn(2, schedule.seq_len, WIDTH)
    full = module(x, masked(levels))
    cache = KVCache(1, 2, HEADS, schedule.seq_len, HEAD_DIM, torch.float32, torch.device("cpu"))
    for where in schedule.slices:
        out = module(x[:, where], cache.attend(0, where))
        torch.testing.assert_close(out, full[:, where], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_layers_of_a_cache_do_not_touch_each_other_nor_what_is_not_written():
    cache = KVCache(3, 2, HEADS, 5, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.keys.fill_(7), cache.values.fill_(7)
    k, v = torch.randn(2, 2, HEADS, 4, HEAD_DIM)
    attend = cache.attend(1, slice(1, 5))
    attend(k, k, v, 1.0, 0.0)
    keys, values = attend.keys, attend.values
    assert keys.shape == values.shape == (2, HEADS, 5, HEAD_DIM)
    assert torch.equal(keys[:, :, 1:], k) and torch.equal(values[:, :, 1:], v)
    assert (cache.keys[[0, 2]] == 7).all() and (cache.values[[0, 2]] == 7).all()
    assert (keys[:, :, :1] == 7).all() and (values[:, :, :1] == 7).all()


@torch.no_grad()
def test_a_bias_of_the_keys_would_change_nothing_under_softmax():
    module, levels = attention(qk_norm=False), torch.zeros(6)
    x = torch.randn(2, 6, WIDTH)
    biased = slow_attention(module, x, levels, key_bias=3 * torch.randn(WIDTH))
    torch.testing.assert_close(module(x, to_all), biased.float(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_learned_scale_of_qk_norm_starts_at_4_and_is_limited_to_100():
    module = SelfAttention(WIDTH, HEADS, qk_norm=True)
    assert module.log_scale.shape == (1, HEADS, 1, 1)
    torch.testing.assert_close(module.log_scale.exp(), torch.full((1, HEADS, 1, 1), 4.0))
    x = torch.randn(2, 6, WIDTH)

    def at(scale):
        module.log_scale.fill_(math.log(scale))
        return module(x, to_all)

    assert torch.equal(at(1000), at(100)) and torch.equal(at(101), at(100))
    assert not torch.allclose(at(90), at(100), atol=1e-6)


def test_the_limit_cuts_the_gradient_of_a_scale_beyond_it():
    module = attention(qk_norm=True)
    module.log_scale.data[0, :, 0, 0] = torch.tensor([math.log(50), math.log(200), math.log(300)])
    module(torch.randn(2, 6, WIDTH), to_all).square().sum().backward()
    gradient = module.log_scale.grad.flatten()
    assert gradient[0] != 0 and (gradient[1:] == 0).all()


@torch.no_grad()
def test_with_qk_norm_the_length_of_queries_and_keys_does_not_matter():
    module, plain = attention(qk_norm=True), attention(qk_norm=False)
    x = torch.randn(2, 6, WIDTH)
    for network, invariant in ((module, True), (plain, False)):
        network.q_bias.zero_()
        before = network(x, to_all)
        network.qkv.weight[: 2 * WIDTH] *= 3  # q and k, not v
        assert torch.allclose(network(x, to_all), before, atol=1e-5) == invariant


@pytest.mark.parametrize(("width", "num_heads"), [(10, 3), (8, 0), (8, 16)])
def test_a_width_that_the_heads_do_not_divide_is_refused(width, num_heads):
    with pytest.raises(ValueError, match=f"got width {width} and {num_heads} heads"):
        SelfAttention(width, num_heads, qk_norm=False)


def test_dropout_acts_in_training_only():
    module, x = attention(qk_norm=False, dropout=0.5), torch.randn(2, 6, WIDTH)
    assert torch.equal(module(x, to_all), module(x, to_all))
    module.train()
    assert not torch.equal(module(x, to_all), module(x, to_all))


def test_under_autocast_queries_and_keys_are_normalised_in_float32():
    vectors = {}

    def attend(q, k, v, scale, dropout):
        vectors[module.log_scale is None] = q, k
        return to_all(q, k, v, scale, dropout)

    module, x = attention(qk_norm=True), torch.randn(8, 6, WIDTH)
    module.log_scale.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        module(x, attend)
        module.log_scale = None
        module(x, attend)
    for ours, raw in zip(vectors[False], vectors[True], strict=True):
        expected = raw.double() / raw.double().norm(dim=-1, keepdim=True)
        assert (ours == expected.bfloat16()).float().mean() > 0.99
