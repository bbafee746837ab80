"""Ways to let a token of scale k see every token of scales 1..k, and no other.

The dense mask says it plainly and computes all L x L pairs. The others compute the visible ones
alone, 62 % of them at 256 pixels, and hold no mask:

    mask        one call under a dense mask (L, L); what the others are tested against
    segments    a call for each scale, whose queries see all keys so far
    flex        FlexAttention (Dong et al., arXiv 2412.05496), which skips hidden blocks; a kernel
                is compiled at its first use, on GPUs

A backend is called with queries, keys and values (B, H, L, E) of one dtype, the factor on their
products and the rate of dropout, and gives (B, H, L, E).

    B batch, H heads, L tokens of the first scales, n_k tokens of scale k, E head dimension
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from var_exp.ops.attention_cpu import attend_segments
from var_exp.scales import ScaleSchedule

Attend = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

AUTO = "auto"
# Tokens from which segments are taken: 680 are quicker that way (AVX2, forward and backward), and
# shorter sequences have as many calls with less to save in each.
LONG = 256


def check_backend(name: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if name not in (AUTO, *BACKENDS):
        raise ValueError(
            f"model.var: attention must be {AUTO} or one of {', '.join(BACKENDS)}, got {name!r} "
            f"(model.var.attention)"
        )


def chosen_backend(name: str, length: int) -> str:
    """What "auto" is for sequences of `length` tokens."""
    if name != AUTO:
        return name
    return "segments" if length >= LONG else "mask"


def attend_whole(name: str, schedule: ScaleSchedule, mask: Tensor) -> Attend:
    """The backend of that name for a sequence that begins with the first scale.

    Args:
        name: a key of `BACKENDS`, or "auto".
        mask: (L, L), true where a query (row) sees a key; L ends at the end of a scale.
    """
    return BACKENDS[chosen_backend(name, len(mask))](schedule, mask)


def attend_masked(
    mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def by_mask(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    return functools.partial(attend_masked, mask)


# -- segments -------------------------------------------------------------------------------


def by_segments(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    ends = [where.stop for where in schedule.slices if where.stop <= len(mask)]
    return functools.partial(attend_segments, ends)


# -- FlexAttention --------------------------------------------------------------------------


def by_flex(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    return functools.partial(attend_flex, schedule, len(mask))


def attend_flex(
    schedule: ScaleSchedule,
    length: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """By FlexAttention, compiled on GPUs.

    Raises:
        ValueError: dropout, or gradients on a CPU, which it cannot do.
    """
    on_cpu = q.device.type == "cpu"
    if dropout > 0 or (on_cpu and any(x.requires_grad for x in (q, k, v))):
        reason = "drop attention weights" if dropout > 0 else "train on a CPU"
        raise ValueError(
            f"model.var: FlexAttention cannot {reason}; choose auto, segments or mask "
            f"(model.var.attention)"
        )
    attend = flex_attention if on_cpu else compiled_flex()
    return attend(q, k, v, block_mask=visible_blocks(schedule, length, q.device), scale=scale)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def visible_blocks(schedule: ScaleSchedule, length: int, device: torch.device) -> Any:
    """Which blocks of pairs are seen: a `BlockMask`, made once for each length."""
    levels = schedule.level_ids()[:length].to(device)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return levels[query] >= levels[key]

    return create_block_mask(sees, None, None, length, length, device=device)


BACKENDS: dict[str, Callable[[ScaleSchedule, Tensor], Attend]] = {
    "mask": by_mask,
    "segments": by_segments,
    "flex": by_flex,
}
