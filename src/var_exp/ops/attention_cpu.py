"""Attention scale by scale: the queries of each scale see the keys of all scales so far.

On a CPU with vector instructions for bfloat16 torch's kernel takes as long in it as in float32; two
matrix products around a softmax are faster there in training. docs/speed.md has the measurements.

    B batch, H heads, L tokens, n queries of a scale, m keys up to its end, E head dimension
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from var_exp.ops.linear import HAS_BFLOAT16

HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # not measured there
MAX_TOKENS = 1024  # whose weights, which grow with their square, the backward pass needs


def attend_per_scale(
    ends: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    """Let the queries of each scale see the keys up to its end: (B, H, L, E) of all.

    Args:
        ends: number of tokens up to the end of each scale.
    """
    if dropout == 0 and use_matmul_attention(q):
        return MatmulAttention.apply(q, k, v, tuple(ends), scale)
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], dropout_p=dropout, scale=scale
        )
        for queries, keys in spans(ends)
    ]
    return torch.cat(parts, dim=2)


def spans(ends: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The queries of each scale and the keys that they see."""
    for first, end in zip((0, *ends), ends, strict=False):
        yield slice(first, end), slice(0, end)


def use_matmul_attention(q: Tensor) -> bool:
    """Whether `MatmulAttention` is faster than torch's kernel for queries (B, H, L, E)."""
    if not HAS_BFLOAT16 or HAS_TILES or not torch.is_grad_enabled():
        return False
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= MAX_TOKENS


class MatmulAttention(torch.autograd.Function):
    """A product, a softmax in float32 and a product for each scale, in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float
    ) -> Tensor:
        # With the tokens of a head next to each other, products of some of them need no copy.
        out, kept = torch.empty_like(q), []
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        for queries, keys in spans(ends):
            with torch.autocast("cpu", enabled=False):  # which would round the logits
                logits = q[:, :, queries].float() @ k[:, :, keys].float().mT  # (B, H, n, m)
            weights = logits.mul_(scale).softmax(dim=-1).to(v.dtype)
            out[:, :, queries] = weights @ v[:, :, keys]
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.ends, ctx.scale = ends, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        grad, grad_q = grad.contiguous(), torch.empty_like(q)
        # Sums of many small terms, in float32 whatever the dtype of the terms.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for (queries, keys), weights in zip(spans(ctx.ends), kept, strict=True):
            of_weights = grad[:, :, queries] @ v[:, :, keys].mT  # (B, H, n, m)
            of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            grad_q[:, :, queries] = (of_logits @ k[:, :, keys]) * ctx.scale
            grad_k[:, :, keys] += (of_logits.mT @ q[:, :, queries]) * ctx.scale
            grad_v[:, :, keys] += weights.mT @ grad[:, :, queries]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
