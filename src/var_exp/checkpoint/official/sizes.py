"""From the names and shapes of a published file's tensors to the networks that they fit.

K scales, L tokens, C width, V codes, D code dimension
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from var_exp.checkpoint.official.names import PHI_FOR_ALL, PHI_FOR_EACH, PHIS
from var_exp.scales import ScaleSchedule, Side

# The schedules of the published models for 256, 512 and 1024 pixels.
SCHEDULES = (
    ScaleSchedule([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
    ScaleSchedule([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
    ScaleSchedule([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]),
)
SOFTMAX_SCALE = 0.25  # over sqrt(C / heads), where the published code has no QK-norm
PHI_RATIO = 0.5

State = Mapping[str, Tensor]


def transformer_arguments(
    state: State, patch_nums: Sequence[Side] | None, num_heads: int | None
) -> dict[str, Any]:
    """Arguments of the `VAR` that a state dict fits.

    Raises:
        ValueError: a tensor that says a size is missing or of another form, or nothing says
            the schedule.
    """
    _, _, width = shape_of(state, "pos_1LC", "(1, L, C)")
    vocab_size, _ = shape_of(state, "head.weight", "(V, C)")
    _, code_dim = shape_of(state, "word_embed.weight", "(C, D)")
    rows, _ = shape_of(state, "class_emb.weight", "(classes + 1, C)")
    hidden, _ = shape_of(state, "blocks.0.ffn.fc1.weight", "(hidden, C)")
    qk_norm = "blocks.0.attn.scale_mul_1H11" in state
    if num_heads is None and qk_norm:
        num_heads = shape_of(state, "blocks.0.attn.scale_mul_1H11", "(1, heads, 1, 1)")[1]
    return {
        "patch_nums": _transformer_schedule(state, patch_nums).patch_nums,
        "vocab_size": vocab_size,
        "code_dim": code_dim,
        "num_classes": rows - 1,
        "depth": count(state, "blocks."),
        "width": width,
        "num_heads": num_heads,
        "mlp_ratio": hidden / width,
        "block": "shared_adaln" if "blocks.0.ada_gss" in state else "adaln",
        "qk_norm": qk_norm,
        "softmax_scale": 1.0 if qk_norm else SOFTMAX_SCALE,
    }


def _transformer_schedule(state: State, patch_nums: Sequence[Side] | None) -> ScaleSchedule:
    """The given schedule, or that in the file: the scale of each token, where it is there."""
    _, seq_len, width = shape_of(state, "pos_1LC", "(1, L, C)")
    if patch_nums is not None:
        schedule = ScaleSchedule(patch_nums)
        if schedule.seq_len != seq_len:
            raise ValueError(
                f"pos_1LC has the shape {(1, seq_len, width)}, it should have "
                f"{(1, schedule.seq_len, width)} for the scales {schedule.patch_nums} "
                f"(patch_nums=...)"
            )
        return schedule
    if "lvl_1L" in state and not state["lvl_1L"].is_meta:
        _, num_tokens = state["lvl_1L"].unique(return_counts=True)
        sides = [math.isqrt(n) for n in num_tokens.tolist()]
        square = [side**2 for side in sides] == num_tokens.tolist()
        if square and sides == sorted(set(sides)):
            return ScaleSchedule(sides)
        raise ValueError("lvl_1L does not say growing square scales; expected patch_nums=[...]")
    num_scales, _ = shape_of(state, "lvl_embed.weight", "(K, C)")
    for schedule in SCHEDULES:
        if (schedule.seq_len, schedule.num_scales) == (seq_len, num_scales):
            return schedule
    raise ValueError(
        f"nothing in it says which {num_scales} scales its {seq_len} tokens have; expected "
        f"patch_nums=[...]"
    )


def tokenizer_arguments(
    state: State, patch_nums: Sequence[Side] | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Image channels, arguments of encoder and decoder, and those of quantizer and codebook.

    Raises:
        ValueError: a tensor that says a size is missing or of another form, or the schedule
            is not the published one for 256 pixels and not given.
    """
    vocab_size, code_dim = shape_of(state, "quantize.embedding.weight", "(V, D)")
    width, channels, _, _ = shape_of(state, "encoder.conv_in.weight", "(ch, channels, 3, 3)")
    num_levels = max(1, count(state, "encoder.down."))
    sizes = {
        "code_dim": code_dim,
        "width": width,
        "multipliers": [_multiplier(state, i, width) for i in range(num_levels)],
        "num_res_blocks": [count(state, f"encoder.down.{i}.block.") for i in range(num_levels)],
        "attention": "encoder.mid.attn_1.qkv.weight" in state,
    }
    row = phi_row(state)
    num_phi = 1 if row == PHI_FOR_ALL else count(state, f"{row}.")
    schedule = _tokenizer_schedule(state, patch_nums)
    if row == PHI_FOR_EACH and num_phi != schedule.num_scales:
        raise ValueError(
            f"it has one phi for each of {num_phi} scales, which does not fit the "
            f"{schedule.num_scales} scales of {schedule.patch_nums} (patch_nums=...)"
        )
    quantizer = {
        "patch_nums": schedule.patch_nums,
        "vocab_size": vocab_size,
        "num_phi": num_phi,
        "phi_ratio": PHI_RATIO,
    }
    return channels, sizes, quantizer


def phi_row(state: State) -> str:
    """Which of the published names the phis have: a key of `PHIS`."""
    return next(row for row in PHIS if row == PHI_FOR_EACH or count(state, f"{row}."))


def _multiplier(state: State, level: int, width: int) -> int:
    name = f"encoder.down.{level}.block.0.conv1.weight"
    channels = shape_of(state, name, "(ch * multiplier, channels, 3, 3)")[0]
    if channels % width:
        raise ValueError(
            f"{name} has the shape {tuple(state[name].shape)}, it should have (a multiple of "
            f"{width}, channels, 3, 3)"
        )
    return channels // width


def _tokenizer_schedule(state: State, patch_nums: Sequence[Side] | None) -> ScaleSchedule:
    """The given schedule, or the one of most published models unless the file counts others.

    One tokenizer serves several schedules (the published file all three), so that a given one
    may have another number of scales than the training counted codes of.
    """
    hits, vocab_size = "quantize.ema_vocab_hit_SV", len(state["quantize.embedding.weight"])
    counted = None
    if hits in state:
        counted, codes = shape_of(state, hits, "(K, V)")
        if codes != vocab_size:
            raise ValueError(
                f"{hits} has the shape {(counted, codes)}, it should have {(counted, vocab_size)}"
            )
    if patch_nums is not None:
        return ScaleSchedule(patch_nums)
    if counted not in (None, SCHEDULES[0].num_scales):
        raise ValueError(
            f"it counts codes of {counted} scales ({hits}), and nothing in it says which; "
            f"expected patch_nums=[...]"
        )
    return SCHEDULES[0]


def shape_of(state: State, name: str, form: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with as many sides as `form` names."""
    if name not in state:
        raise ValueError(f"{name} is missing, it should have the shape {form}")
    shape = tuple(state[name].shape)
    if len(shape) != form.count(",") + 1 or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}, it should have {form}")
    return shape


def count(state: State, prefix: str) -> int:
    """How many modules of a list the names know, those that start with `prefix`."""
    return len({n.removeprefix(prefix).split(".")[0] for n in state if n.startswith(prefix)})
