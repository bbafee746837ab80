"""Every way to attend computes what the dense mask computes, values and gradients."""

import pytest
import torch

from helpers.tiny import tiny_transformer
from var_exp.ops.attention import block_causal_attention, check_backend, resolve_backend
from var_exp.scales import ScaleSchedule
from var_exp.transformer.var import ExecutionOptions

SCHEDULES = {
    "256 pixels": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "512 pixels": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    "one scale": [3],
    "first of many tokens": [2, 3, 5],
    "oblong": [[1, 2], [2, 3], [4, 3]],
}
HEADS, HEAD_DIM, SCALE = 2, 8, 0.7


@pytest.fixture
def vectors(monkeypatch):
    """A processor with vector instructions for bfloat16."""
    monkeypatch.setattr("var_exp.ops.attention_cpu.HAS_BFLOAT16", True)
    monkeypatch.setattr("var_exp.ops.attention_cpu.HAS_TILES", False)


each_schedule = pytest.mark.parametrize("patch_nums", SCHEDULES.values(), ids=SCHEDULES)


def make(name, patch_nums, num_scales=None):
    schedule = ScaleSchedule(patch_nums)
    length = schedule.slices[(num_scales or schedule.num_scales) - 1].stop
    levels = schedule.level_ids()[:length]
    return block_causal_attention(name, schedule, levels[:, None] >= levels[None, :]), length


def drawn(length, dtype=torch.float32):
    """Queries, keys and values as a projection leaves them."""
    qkv = torch.randn(2, length, 3, HEADS, HEAD_DIM, dtype=dtype).permute(2, 0, 3, 1, 4)
    return [part.requires_grad_(torch.is_grad_enabled()) for part in qkv.unbind()]


def with_gradients(attend, tensors, weights, dropout=0.0):
    out = attend(*tensors, SCALE, dropout)
    return out, *torch.autograd.grad((out.float() * weights).sum(), tensors)


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_scale_equal_the_dense_mask_with_their_gradients(patch_nums, dtype, vectors):
    slow, length = make("mask", patch_nums)
    fast, _ = make("per_scale", patch_nums)
    tensors = drawn(length, dtype=dtype)
    weights = torch.randn(2, HEADS, length, HEAD_DIM)
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    found = zip(*(with_gradients(a, tensors, weights) for a in (fast, slow)), strict=True)
    for ours, expected in found:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, **near)


@each_schedule
@pytest.mark.parametrize("name", ["per_scale", "flex"])
@torch.no_grad()
def test_without_gradients_too(patch_nums, name):
    slow, length = make("mask", patch_nums)
    fast, _ = make(name, patch_nums)
    tensors = drawn(length)
    torch.testing.assert_close(
        fast(*tensors, SCALE, 0.0), slow(*tensors, SCALE, 0.0), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["per_scale", "flex"])
@torch.no_grad()
def test_the_first_scales_alone_are_attended_to_alike(name):
    patch_nums = SCHEDULES["256 pixels"]
    for num_scales in (1, 4, 7):
        slow, length = make("mask", patch_nums, num_scales)
        fast, _ = make(name, patch_nums, num_scales)
        tensors = drawn(length)
        torch.testing.assert_close(
            fast(*tensors, SCALE, 0.0), slow(*tensors, SCALE, 0.0), atol=1e-5, rtol=1e-4
        )


def test_weights_are_kept_for_sequences_that_are_not_long_alone(vectors):
    for size, kept in (("256 pixels", True), ("512 pixels", False)):
        attend, length = make("per_scale", SCHEDULES[size])
        out = attend(*drawn(length, torch.bfloat16), SCALE, 0.0)
        assert (type(out.grad_fn).__name__ == "MatmulAttentionBackward") == kept


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_logits_are_computed_in_float32(autocast, vectors):
    attend, length = make("per_scale", SCHEDULES["256 pixels"])
    q, k, v = drawn(length, torch.bfloat16)
    weights = torch.randn(2, HEADS, length, HEAD_DIM)
    # Exponents of hundreds, of which 8 bits say little.
    sharp = [20 * q.detach(), k.detach(), v.detach()]
    precise = [x.float().requires_grad_() for x in sharp]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = with_gradients(attend, [x.requires_grad_() for x in sharp], weights)
    for ours, expected in zip(found, with_gradients(attend, precise, weights), strict=True):
        error = (ours.float() - expected).norm() / expected.norm()
        assert error < 0.02


def test_per_scale_drop_attention_weights_where_they_are_told_to():
    attend, length = make("per_scale", [1, 2, 3])
    tensors = drawn(length)
    torch.manual_seed(0)
    first = attend(*tensors, SCALE, 0.5)
    assert not torch.equal(first, attend(*tensors, SCALE, 0.5))
    torch.manual_seed(0)
    assert torch.equal(first, attend(*tensors, SCALE, 0.5))


def test_flex_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="train on a CPU.*model.var.attention"):
        make("flex", [1, 2, 3])
    with torch.no_grad(), pytest.raises(ValueError, match="drop attention weights"):
        attend, length = make("flex", [1, 2, 3])
        attend(*drawn(length), SCALE, 0.1)


def test_auto_takes_per_scale_for_long_sequences_alone():
    assert resolve_backend("auto", 680) == resolve_backend("per_scale", 1) == "per_scale"
    assert resolve_backend("auto", 30) == resolve_backend("mask", 680) == "mask"
    assert resolve_backend("flex", 30) == "flex"


def test_an_unknown_backend_is_refused_by_its_key():
    for name in ("auto", "mask", "per_scale", "flex"):
        check_backend(name)
    with pytest.raises(ValueError, match="got 'flash' .model.var.attention"):
        check_backend("flash")


@torch.no_grad()
def test_a_transformer_says_the_same_whichever_it_attends_by():
    transformer = tiny_transformer().eval()
    inputs = torch.randn(2, transformer.schedule.seq_len - 1, transformer.code_dim)
    found = {}
    for name in ("mask", "per_scale", "flex"):
        transformer.execution = ExecutionOptions(attention=name)
        found[name] = transformer(inputs, torch.tensor([0, 1]))
    for name in ("per_scale", "flex"):
        torch.testing.assert_close(found[name], found["mask"], atol=1e-5, rtol=1e-4)
