"""Block-causal attention: a token of scale k sees every token of scales 1..k, and no other.

The dense mask states it plainly and computes all L x L pairs. The other backends compute the
visible pairs alone, 62 % of them at 256 pixels, and hold no mask:

    mask        one call with a dense mask (L, L); the reference for the others
    per_scale    one call per scale, whose queries see all keys so far
    flex        FlexAttention (Dong et al., arXiv 2412.05496), which skips hidden blocks; its kernel
                is compiled at the first use, on GPUs

A backend is called with queries, keys and values (B, H, L, E) of one dtype, the factor on their
products and the dropout probability, and returns (B, H, L, E).

    B batch, H heads, L tokens of the first scales, n_k tokens of scale k, E head dimension
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from var_exp.ops.attention_cpu import attend_per_scale
from var_exp.scales import ScaleSchedule

Attend = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]

AUTO = "auto"
# Tokens from which "auto" takes per_scale: 680 are faster that way (AVX2, forward and backward);
# shorter sequences make as many calls and save less in each.
LONG = 256


def check_backend(name: str) -> None:
    """Raise ValueError for an unknown backend."""
    if name not in (AUTO, *BACKENDS):
        raise ValueError(
            f"model.var: attention must be {AUTO} or one of {', '.join(BACKENDS)}, got {name!r} "
            f"(model.var.attention)"
        )


def resolve_backend(name: str, length: int) -> str:
    """Return the backend that "auto" takes for `length` tokens, and any other name unchanged."""
    if name != AUTO:
        return name
    return "per_scale" if length >= LONG else "mask"


def block_causal_attention(name: str, schedule: ScaleSchedule, mask: Tensor) -> Attend:
    """The backend of that name for a sequence that begins with the first scale.

    Args:
        name: a key of `BACKENDS`, or "auto".
        mask: (L, L), true where a query (row) sees a key; L ends at the end of a scale.
    """
    return BACKENDS[resolve_backend(name, len(mask))](schedule, mask)


def masked(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    return functools.partial(attend_masked, mask)


def attend_masked(
    mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def per_scale(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    ends = [tokens.stop for tokens in schedule.slices if tokens.stop <= len(mask)]
    return functools.partial(attend_per_scale, ends)


def flex(schedule: ScaleSchedule, mask: Tensor) -> Attend:
    """Use FlexAttention.

    Raises:
        ValueError: gradients on a CPU, or dropout in the call, which it does not support.
    """
    if mask.device.type == "cpu" and torch.is_grad_enabled():
        raise flex_error("train on a CPU")
    return functools.partial(attend_flex, block_mask(schedule, len(mask), mask.device))


def attend_flex(
    visible: BlockMask, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    if dropout > 0:
        raise flex_error("drop attention weights")
    attend: Any = flex_attention if q.device.type == "cpu" else compiled_flex()
    return attend(q, k, v, block_mask=visible, scale=scale)


def flex_error(action: str) -> ValueError:
    return ValueError(
        f"model.var: FlexAttention cannot {action}; choose auto, per_scale or mask "
        f"(model.var.attention)"
    )


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def block_mask(schedule: ScaleSchedule, length: int, device: torch.device) -> BlockMask:
    """The visible blocks of pairs, made once for each number of scales."""
    levels = schedule.level_ids()[:length].to(device)

    def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return levels[query] >= levels[key]

    return create_block_mask(is_visible, None, None, length, length, device=device)


BACKENDS: dict[str, Callable[[ScaleSchedule, Tensor], Attend]] = {
    "mask": masked,
    "per_scale": per_scale,
    "flex": flex,
}
