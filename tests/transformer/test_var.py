"""The transformer predicts a scale from coarser ones alone, fast and slow alike."""

import functools
import math

import pytest
import torch
from torch import nn

from helpers.tiny import BLOCKS, ODD_SCALES, SCALES, tiny_transformer
from var_exp.ops.attention import attend_masked
from var_exp.transformer import VAR
from var_exp.transformer.block import AdaLNBlock, SharedAdaLNBlock

ALL = {"five": SCALES, **ODD_SCALES}
VAR_256 = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
VAR_512 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]

TOGETHER = {"rope": True, "mlp": "swiglu", "norm": "rms"}
VARIANTS = {
    "published": {},
    "no_qk_norm": {"qk_norm": False},
    **{key: {key: value} for key, value in TOGETHER.items()},
    "together": TOGETHER,
    "together_no_qk_norm": TOGETHER | {"qk_norm": False},
}

every_block = pytest.mark.parametrize("block", BLOCKS)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def inputs_for(network, batch_size=2):
    schedule = network.schedule
    length = schedule.seq_len - schedule.num_tokens[0]
    return torch.randn(batch_size, length, network.code_dim)


def logits_with_cache(network, inputs, labels):
    """Scale by scale, as in sampling."""
    condition, cache = network.condition(labels), network.make_cache(len(labels))
    first = network.schedule.num_tokens[0]
    parts = []
    for k, where in enumerate(network.schedule.slices):
        part = inputs[:, where.start - first : where.stop - first] if k else None
        parts.append(network.forward_scale(k, part, condition, cache))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
@every_block
@every_variant
@torch.no_grad()
def test_scale_by_scale_with_the_cache_equals_the_masked_forward(patch_nums, block, variant):
    network = tiny_transformer(patch_nums, block, **variant)
    inputs, labels = inputs_for(network), torch.tensor([2, 3])
    full = network(inputs, labels)
    assert full.shape == (2, network.schedule.seq_len, network.vocab_size)
    cached = logits_with_cache(network, inputs, labels)
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
@every_block
@every_variant
@torch.no_grad()
def test_changing_the_input_of_a_scale_changes_no_coarser_logits(patch_nums, block, variant):
    """The input of scale k + 1 is all that the codes of scale k touch first."""
    network = tiny_transformer(patch_nums, block, **variant)
    inputs, labels = inputs_for(network), torch.tensor([0, 1])
    before, first = network(inputs, labels), network.schedule.num_tokens[0]
    for where in network.schedule.slices[1:]:
        for token in {where.start, where.stop - 1}:
            other = inputs.clone()
            other[:, token - first] += 1
            after = network(other, labels)
            torch.testing.assert_close(
                after[:, : where.start], before[:, : where.start], atol=1e-6, rtol=0
            )
            changed = (after - before).abs().amax(dim=(0, 2)) > 1e-5
            assert changed[where.start :].all()  # the whole scale sees it, and all finer ones


@every_block
@torch.no_grad()
def test_the_forward_is_the_blocks_told_one_after_the_other(block):
    network = tiny_transformer([2, 3], block)
    inputs, labels = inputs_for(network), torch.tensor([1, 0])
    embedding = network.class_embedding.weight[labels]
    x = torch.zeros(2, 13, 16)
    for i in range(13):
        level = 0 if i < 4 else 1
        start = embedding + network.start_position[0, i] if i < 4 else None
        later = None if i < 4 else network.code_projection(inputs[:, i - 4])
        x[:, i] = (start if i < 4 else later) + network.position[0, i]
        x[:, i] += network.level_embedding.weight[level]
    silu = embedding * embedding.sigmoid()
    mask = torch.ones(13, 13, dtype=torch.bool)
    mask[:4, 4:] = False
    attend = functools.partial(attend_masked, mask)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x if layer.weight is None else x * layer.weight + layer.bias

    for b in network.blocks:
        if block == "gpt2":
            x = x + b.attn(norm(x, b.norm1), attend)
            x = x + b.mlp(norm(x, b.norm2))
            continue
        if block == "adaln":
            six = b.ada_lin(silu).view(2, 6, 1, 16)
        else:
            linear = network.shared_modulation[1]
            six = (linear(silu).view(2, 6, 16) + b.ada_offset[0, 0]).unsqueeze(2)
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = six.unbind(1)
        x = x + gate_attn * b.attn(norm(x, b.norm1) * (1 + scale_attn) + shift_attn, attend)
        x = x + gate_mlp * b.mlp(norm(x, b.norm2) * (1 + scale_mlp) + shift_mlp)
    x = norm(x, network.head.norm)
    if block != "gpt2":
        scale, shift = network.head.ada_lin(silu).view(2, 2, 1, 16).unbind(1)
        x = x * (1 + scale) + shift
    expected = network.head.linear(x)
    torch.testing.assert_close(network(inputs, labels), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_mlp_has_the_tanh_gelu():
    mlp = tiny_transformer().blocks[0].mlp
    x = torch.randn(4, 16)
    h = mlp.fc1(x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.fc2(h), atol=1e-6, rtol=1e-5)


@every_block
@every_variant
@torch.no_grad()
def test_fewer_scales_in_are_fewer_scales_out(block, variant):
    network = tiny_transformer(block=block, **variant)
    inputs, labels = inputs_for(network), torch.tensor([0, 1])
    full = network(inputs, labels)
    for where in network.schedule.slices:
        part = network(inputs[:, : where.stop - 1], labels)
        torch.testing.assert_close(part, full[:, : where.stop], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 5, 53, 55])
def test_inputs_that_end_inside_a_scale_are_refused(transformer, length):
    with pytest.raises(ValueError, match=f"length of {length + 1} ends inside a scale"):
        transformer(torch.zeros(1, length, 4), torch.tensor([0]))


# -- classes ------------------------------------------------------------------------------


@every_block
@torch.no_grad()
def test_no_labels_mean_the_row_of_no_class(block):
    network = tiny_transformer(block=block)
    inputs = inputs_for(network)
    without = network(inputs)
    assert torch.equal(without, network(inputs, torch.tensor([3, 3])))
    for label in range(3):
        assert not torch.allclose(without, network(inputs, torch.tensor([label] * 2)))


@every_block
@torch.no_grad()
def test_a_row_of_the_batch_knows_its_own_class_alone(block):
    network = tiny_transformer(block=block)
    inputs = inputs_for(network, 3)
    together = network(inputs, torch.tensor([0, 1, 2]))
    for i in range(3):
        alone = network(inputs[i : i + 1], torch.tensor([i]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_label_out_of_range_is_refused_with_its_value(transformer, label):
    with pytest.raises(ValueError, match=rf"classes in 0\.\.2 \(or 3 for no class\), got {label}"):
        transformer(inputs_for(transformer), torch.tensor([0, label]))


def test_zero_classes_leave_only_no_class():
    network = tiny_transformer(num_classes=0)
    inputs = inputs_for(network)
    assert torch.equal(network(inputs), network(inputs, torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="got 1"):
        network(inputs, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("block", r"\['adaln', 'gpt2', 'shared_adaln'\]"),
        ("mlp", r"\['gelu', 'swiglu'\]"),
        ("norm", r"\['layer', 'rms'\]"),
    ],
)
def test_an_unknown_part_is_refused_with_the_known_ones(option, known):
    with pytest.raises(ValueError, match=rf"{known}, got 'dit' \(transformer\.{option}\)"):
        VAR([1, 2], **{option: "dit"})


@pytest.mark.parametrize("num_heads", [3, 5])
def test_a_width_that_the_heads_do_not_divide_is_refused(num_heads):
    with pytest.raises(ValueError, match=f"width 16 and {num_heads} heads"):
        tiny_transformer(num_heads=num_heads)


# -- precision and training ---------------------------------------------------------------


@every_block
@every_variant
@torch.no_grad()
def test_logits_are_float32_and_close_under_bf16_autocast(block, variant):
    network = tiny_transformer(block=block, **variant)
    inputs, labels = inputs_for(network), torch.tensor([0, 1])
    exact = network(inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rough, cached = network(inputs, labels), logits_with_cache(network, inputs, labels)
    assert exact.dtype == rough.dtype == cached.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.std()
    assert (cached - exact).abs().mean() < 0.05 * exact.std()


@every_block
@every_variant
def test_every_parameter_takes_part_in_training(block, variant):
    network = tiny_transformer(block=block, **variant).train()
    network(inputs_for(network), torch.tensor([0, 1])).logsumexp(dim=-1).sum().backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("argument", ["dropout", "drop_path"])
@every_block
def test_dropout_and_drop_path_act_in_training_only(argument, block):
    network = tiny_transformer(block=block, **{argument: 0.5})
    inputs, labels = inputs_for(network), torch.tensor([0, 1])
    assert torch.equal(network(inputs, labels), network(inputs, labels))
    network.train()
    assert any(not torch.equal(network(inputs, labels), network(inputs, labels)) for _ in range(10))


def test_drop_path_grows_linearly_over_the_blocks():
    network = tiny_transformer(depth=5, drop_path=0.2)
    assert [b.drop_path.item() for b in network.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert tiny_transformer(depth=1, drop_path=0.2).blocks[0].drop_path == 0


@torch.no_grad()
def test_a_dropped_path_leaves_a_sample_as_it_was_and_a_kept_one_makes_up_for_it():
    block = tiny_transformer(block="gpt2", drop_path=0.5).blocks[1].train()
    branch = torch.randn(200, 3, 16)
    out = block.skip(branch)
    dropped = (out == 0).all(dim=(1, 2))
    assert 60 < dropped.sum() < 140
    torch.testing.assert_close(out[~dropped], branch[~dropped] / 0.5)


# -- the published sizes and initialisation -----------------------------------------------


@pytest.mark.parametrize(
    ("depth", "patch_nums", "block", "expected"),
    [
        (16, VAR_256, "adaln", 310_283_520),
        (20, VAR_256, "adaln", 600_917_136),
        (24, VAR_256, "adaln", 1_033_399_360),
        (30, VAR_256, "adaln", 2_010_020_356),
        (36, VAR_512, "shared_adaln", 2_353_893_904),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(
    depth, patch_nums, block, expected
):
    with torch.device("meta"):
        network = VAR(patch_nums, depth=depth, block=block)
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network.width == 64 * depth and network.num_heads == depth


def test_masks_and_levels_stay_out_of_checkpoints(transformer):
    assert set(transformer.state_dict()) == {name for name, _ in transformer.named_parameters()}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("block", ["adaln", "shared_adaln"])
def test_initial_weights_are_as_published(block, mlp):
    width, depth, gate_init = 192, 3, 1e-2
    sizes = {"depth": depth, "width": width, "gate_init": gate_init}
    network = VAR([1, 2, 3], 512, block=block, mlp=mlp, **sizes)
    std = math.sqrt(1 / (3 * width))
    expected = {
        network.class_embedding.weight: std,
        network.level_embedding.weight: std,
        network.position: std,
        network.start_position: std,
        network.code_projection.weight: std,
        network.head.linear.weight: 0.02 * std,
        network.head.ada_lin.weight: 0.5 * std,
    }
    for b in network.blocks:
        expected |= {b.attn.qkv.weight: std, b.mlp.fc1.weight: std}
        residual = std / math.sqrt(2 * depth)
        expected |= {b.attn.proj.weight: residual, b.mlp.fc2.weight: residual}
        if isinstance(b, SharedAdaLNBlock):
            six, unit = b.ada_offset[0, 0], width**-0.5
        else:
            assert isinstance(b, AdaLNBlock)
            six, unit = b.ada_lin.weight.view(6, width, width), std
        expected |= {six[:2]: gate_init * unit, six[2:]: 0.5 * unit}
    if block == "shared_adaln":
        expected[network.shared_modulation[1].weight] = std
    for tensor, wanted in expected.items():
        n = tensor.numel()  # bounds of four standard errors
        assert tensor.std().item() == pytest.approx(wanted, rel=4 / math.sqrt(2 * n))
        assert abs(tensor.mean()) < 4 * wanted / math.sqrt(n)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert len(biases) > 10 and all((bias == 0).all() for bias in biases)
    scales = torch.cat([b.attn.log_scale.flatten() for b in network.blocks])
    torch.testing.assert_close(scales, torch.full_like(scales, math.log(4)))


@pytest.mark.parametrize(("norm", "kind"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm)])
def test_gpt2s_norms_have_affine_weights_at_one_and_the_papers_have_none(norm, kind):
    sizes = {"depth": 2, "width": 16, "num_heads": 2, "norm": norm}
    norms = {
        block: [m for m in VAR([1, 2], 16, block=block, **sizes).modules() if isinstance(m, kind)]
        for block in BLOCKS
    }
    assert [len(ns) for ns in norms.values()] == [5, 5, 5]  # two for each block, one for the head
    assert all((n.weight == 1).all() for n in norms["gpt2"])
    assert all((n.bias == 0).all() for n in norms["gpt2"] if norm == "layer")
    assert all(n.weight is None for n in norms["adaln"] + norms["shared_adaln"])
    assert all(n.eps == 1e-6 for ns in norms.values() for n in ns)


@torch.no_grad()
@every_variant
@every_block
def test_the_first_loss_is_that_of_guessing(block, variant):
    network = VAR([1, 2, 3], 512, 8, 10, depth=2, width=64, block=block, **variant)
    logits = network(torch.randn(4, 13, 8), torch.arange(4))
    loss = -logits.log_softmax(dim=-1).mean()
    assert abs(loss - math.log(512)) < 0.01
