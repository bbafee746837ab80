"""Schedules hit the values of the recipe, and only what should decay decays."""

import math

import pytest
import torch
from torch import nn

from helpers.tiny import BLOCKS, tiny_quantizer, tiny_tokenizer, tiny_transformer
from var_exp.training.optim import CosineSchedule, LinearSchedule, WarmupSchedule, param_groups

# The published recipe: epochs / 50 from 0.005 of the peak, held for 5 % of the rest (up to
# 0.02 + 0.05 * 0.98 = 0.069 of the stage), then a line to a tenth.
PUBLISHED = {
    0.0: 0.005,
    0.005: 0.25375,
    0.01: 0.5025,
    0.02: 1.0,
    0.05: 1.0,
    0.069: 1.0,
    0.1621: 0.91,
    0.30175: 0.775,
    0.5345: 0.55,
    0.76725: 0.325,
    1.0: 0.1,
}

COSINE = {0.0: 0.005, 0.02: 0.5025, 0.04: 1.0, 0.28: 0.856482, 0.52: 0.51, 0.76: 0.163518, 1: 0.02}


@pytest.mark.parametrize("progress", PUBLISHED)
def test_the_linear_schedule_is_the_published_one(progress):
    schedule = LinearSchedule(warmup=0.02, start=0.005, hold=0.05, final=0.1)
    assert schedule(progress) == pytest.approx(PUBLISHED[progress], abs=1e-9)


@pytest.mark.parametrize("progress", COSINE)
def test_the_cosine_schedule_is_a_half_cosine_after_the_warm_up(progress):
    schedule = CosineSchedule(warmup=0.04, final=0.02)
    assert schedule(progress) == pytest.approx(COSINE[progress], abs=1e-6)


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule])
@pytest.mark.parametrize(("warmup", "hold"), [(0.02, 0.05), (0.0, 0.0), (0.3, 0.5), (0.1, 1.0)])
def test_a_schedule_rises_to_the_peak_stays_and_falls_without_a_jump(kind, warmup, hold):
    schedule = kind(warmup=warmup, start=0.1, hold=hold, final=0.2)
    steps = 10_000
    values = [schedule(step / steps) for step in range(steps + 1)]
    top = max(values)
    first, last = values.index(top), steps - values[::-1].index(top)
    assert top == 1
    assert values[: first + 1] == sorted(values[: first + 1])
    assert values[last:] == sorted(values[last:], reverse=True)
    assert values[first : last + 1] == [1] * (last - first + 1)
    assert first / steps == pytest.approx(warmup, abs=1e-3)
    assert last / steps == pytest.approx(warmup + hold * (1 - warmup), abs=1e-3)
    assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) < 5e-3
    assert values[0] == (0.1 if warmup else 1)
    assert values[-1] == (1 if hold == 1 else pytest.approx(0.2))


def test_the_base_does_not_know_how_to_decay():
    with pytest.raises(NotImplementedError):
        WarmupSchedule()(0.5)


def names_of(network, group):
    ours = {id(p) for p in group["params"]}
    return {name for name, p in network.named_parameters() if id(p) in ours}


def test_what_decays_in_the_shared_adaln_transformer_is_written_out():
    network = tiny_transformer(block="shared_adaln", depth=1)
    decay, rest = param_groups(network, 0.05)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert names_of(network, decay) == {
        "class_embedding.weight",
        "code_projection.weight",
        "shared_modulation.1.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.linear.weight",
        "head.ada_lin.weight",
    }
    assert names_of(network, rest) == {
        "start_position",
        "position",
        "level_embedding.weight",
        "code_projection.bias",
        "shared_modulation.1.bias",
        "blocks.0.ada_offset",
        "blocks.0.attn.q_bias",
        "blocks.0.attn.v_bias",
        "blocks.0.attn.log_scale",
        "blocks.0.attn.proj.bias",
        "blocks.0.mlp.fc1.bias",
        "blocks.0.mlp.fc2.bias",
        "head.linear.bias",
        "head.ada_lin.bias",
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_is_in_exactly_one_group_and_no_vector_decays(block):
    network = tiny_transformer(block=block)
    groups = param_groups(network, 0.1)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in network.parameters())
    decaying = groups[0]["params"]
    assert all(p.ndim >= 2 for p in decaying)
    assert any(p is network.class_embedding.weight for p in decaying)
    norms = [m.weight for m in network.modules() if isinstance(m, nn.LayerNorm)]
    assert not any(p is norm for p in decaying for norm in norms)


def test_what_takes_no_gradient_is_in_no_group():
    network = tiny_tokenizer(tiny_quantizer(ema=True))
    members = [p for group in param_groups(network, 0.1) for p in group["params"]]
    assert all(p.requires_grad for p in members)
    assert not any(p is network.quantizer.codebook(0).weight for p in members)
    assert len(members) == len(list(network.parameters())) - 1


def test_an_empty_group_is_left_out():
    assert len(param_groups(nn.LayerNorm(3), 0.1)) == 1
    assert len(param_groups(nn.Linear(3, 3, bias=False), 0.1)) == 1
    assert len(param_groups(nn.Linear(3, 3), 0.1)) == 2


def test_an_optimizer_shrinks_the_decaying_group_alone():
    network = nn.Linear(2, 2)
    network.weight.data.fill_(1.0), network.bias.data.fill_(1.0)
    optimizer = torch.optim.AdamW(param_groups(network, 0.5), lr=0.1)
    network.weight.grad, network.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert network.weight.eq(1).sum() == 0 and network.bias.eq(1).all()
    assert math.isclose(network.weight[0, 0].item(), 1 - 0.1 * 0.5, rel_tol=1e-6)
