"""What the transformer can have beside the published parts: rotary places, SwiGLU, RMSNorm."""

import json

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny import BLOCKS, tiny_transformer
from var_exp.configurable import build
from var_exp.scales import ScaleSchedule
from var_exp.transformer.block import MLP, SwiGLU
from var_exp.transformer.rope import rotate, rotation_table

OPTIONS = {"rope": True, "mlp": "swiglu", "norm": "rms"}
each_option = pytest.mark.parametrize("option", OPTIONS)
every_block = pytest.mark.parametrize("block", BLOCKS)


@each_option
@every_block
@torch.no_grad()
def test_each_option_changes_the_logits_and_travels_with_the_spec(option, block):
    network = tiny_transformer(block=block, **{option: OPTIONS[option]})
    weights, inputs = network.state_dict(), torch.randn(2, 54, 4)
    again = build(json.loads(json.dumps(network.config))).eval()
    again.load_state_dict(weights)
    assert torch.equal(again(inputs), network(inputs))
    without = tiny_transformer(block=block)
    same = {n: t for n, t in weights.items() if t.shape == without.state_dict()[n].shape}
    without.load_state_dict(same, strict=False)
    assert not torch.allclose(without(inputs), network(inputs), atol=1e-2)


@every_block
def test_no_option_gives_a_tensor_another_name(block):
    """RMSNorm leaves out the biases of affine norms, and nothing else comes or goes."""
    names = set(tiny_transformer(block=block).state_dict())
    norm_biases = {n for n in names if "norm" in n and n.endswith("bias")}
    assert len(norm_biases) == (5 if block == "gpt2" else 0)
    assert set(tiny_transformer(block=block, rope=True).state_dict()) == names
    assert set(tiny_transformer(block=block, mlp="swiglu").state_dict()) == names
    assert set(tiny_transformer(block=block, norm="rms").state_dict()) == names - norm_biases


# -- rotary position embedding ------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (3, 6), (5, 2)])
def test_a_logit_knows_how_far_apart_two_places_are_and_not_where(size):
    schedule = ScaleSchedule([size])
    q, k = torch.randn(2, 1, 1, 1, 8)
    rotation = rotation_table(schedule, 8)
    everywhere = (1, 1, schedule.seq_len, 8)
    queries, keys = rotate(q.expand(everywhere), rotation), rotate(k.expand(everywhere), rotation)
    logits = (queries @ keys.mT).view(*size, *size)
    by_difference = {}
    for i, j, m, n in torch.cartesian_prod(*map(torch.arange, size * 2)).tolist():
        by_difference.setdefault((m - i, n - j), []).append(logits[i, j, m, n])
    assert len(by_difference) == (2 * size[0] - 1) * (2 * size[1] - 1)
    for same in by_difference.values():
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)))
    means = torch.stack([torch.stack(same).mean() for same in by_difference.values()])
    assert len(means.round(decimals=4).unique()) > 20


def test_one_place_of_the_image_has_the_same_angles_at_every_scale():
    """A cell of a map that is three times finer along both axes has the centre of the coarser."""
    for coarse, fine in (((1, 1), (3, 3)), ((2, 2), (6, 6)), ((1, 2), (3, 6)), ((3, 1), (9, 3))):
        schedule = ScaleSchedule([coarse, fine])
        first, second = rotation_table(schedule, 16).split(schedule.num_tokens, dim=1)
        centres = second.unflatten(1, fine)[:, 1::3, 1::3]  # (2, h, w, E / 2)
        torch.testing.assert_close(first.unflatten(1, coarse), centres)
    whole, quarters, _ = rotation_table(ScaleSchedule([1, 2, 5]), 16).split([1, 4, 25], dim=1)
    assert not torch.allclose(whole, quarters[:, :1], atol=0.1)


def test_rows_turn_the_first_half_of_a_head_and_columns_the_second():
    rotation = rotation_table(ScaleSchedule([[2, 3]]), 8).unflatten(1, (2, 3))  # (2, h, w, E / 2)
    rows, columns = rotation.chunk(2, dim=-1)
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))
    assert torch.equal(columns, columns[:, :1].expand_as(columns))
    assert not torch.allclose(rows[:, 0], rows[:, 1], atol=0.1)
    assert not torch.allclose(columns[:, :, 0], columns[:, :, 1], atol=0.1)


@torch.no_grad()
def test_the_cache_holds_turned_keys_whose_norms_are_those_of_qk_norm():
    plain, rotary = tiny_transformer([2, 3]), tiny_transformer([2, 3], rope=True)
    rotary.load_state_dict(plain.state_dict())
    keys = []
    for network in (plain, rotary):
        condition, cache = network.condition(torch.tensor([0, 1])), network.make_cache(2)
        network.forward_scale(0, None, condition, cache)
        keys.append(cache.keys[0, :, :, :4])  # the first layer reads the same in both
    torch.testing.assert_close(keys[1].norm(dim=-1), torch.ones(2, 2, 4))
    torch.testing.assert_close(keys[1], rotate(keys[0], rotary.rotation[:, :4]))
    assert not torch.allclose(keys[1], keys[0], atol=0.1)


def test_the_angles_are_a_float32_buffer_that_stays_out_of_checkpoints_and_is_not_there_without():
    rotary, plain = tiny_transformer([[1, 2], [2, 4]], rope=True), tiny_transformer()
    assert rotary.rotation.shape == (2, 10, 4) and rotary.rotation.dtype == torch.float32
    assert "rotation" in dict(rotary.named_buffers()) and "rotation" not in rotary.state_dict()
    assert plain.rotation is None and "rotation" not in dict(plain.named_buffers())


@pytest.mark.parametrize(("width", "num_heads"), [(12, 2), (14, 1)])
def test_heads_that_two_axes_of_pairs_do_not_fill_are_refused(width, num_heads):
    message = rf"divisible by 4, got {width // num_heads} \(transformer.rope, transformer.width, tr"
    with pytest.raises(ValueError, match=message):
        tiny_transformer(width=width, num_heads=num_heads, rope=True)
    assert tiny_transformer(width=width, num_heads=num_heads).rotation is None


# -- SwiGLU and RMSNorm -------------------------------------------------------------------


@torch.no_grad()
def test_swiglu_is_its_formula():
    mlp = tiny_transformer(mlp="swiglu").blocks[0].mlp
    x = torch.randn(4, 16)
    gate_weight, value_weight = mlp.fc1.weight.chunk(2)
    gate_bias, value_bias = mlp.fc1.bias.chunk(2)
    gate = x @ gate_weight.T + gate_bias
    expected = F.linear(gate * gate.sigmoid() * (x @ value_weight.T + value_bias), mlp.fc2.weight)
    torch.testing.assert_close(mlp(x), expected + mlp.fc2.bias)


@pytest.mark.parametrize("width", [64, 96, 192, 320, 512, 1000, 1024])
@pytest.mark.parametrize("mlp_ratio", [3.0, 4.0])
def test_swiglu_has_as_many_parameters_as_the_mlp_it_replaces(width, mlp_ratio):
    mlp, swiglu = MLP(width, mlp_ratio, 0.0), SwiGLU(width, mlp_ratio, 0.0)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (swiglu, mlp))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert swiglu.fc2.in_features % 8 == 0


@every_block
@torch.no_grad()
def test_rms_norm_is_its_formula_in_every_place(block):
    network = tiny_transformer(block=block, norm="rms")
    x = 3 * torch.randn(2, 5, 16) + 1
    for norm in [n for b in network.blocks for n in (b.norm1, b.norm2)] + [network.head.norm]:
        expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        if block == "gpt2":
            expected = expected * norm.weight
        torch.testing.assert_close(norm(x), expected)


def test_dropout_of_swiglu_acts_in_training_only():
    mlp, x = SwiGLU(16, 4.0, 0.5), torch.randn(4, 16)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))
