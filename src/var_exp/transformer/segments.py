"""Attention scale by scale: the queries of each see the keys of all scales so far, and no mask.

On a CPU the backward pass is written out. Autograd would make the gradients of keys and values anew
for each scale, padded with zeros, and add them up; here there is one of each, to which every scale
adds its part. The forward pass comes in two ways (`Whole`, `Products`), by the dtype.

    B batch, H heads, L tokens, n tokens of a scale, m tokens up to its end, E head dimension
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# Tokens up to which `Products` may keep its weights: those of a block are as large as the rest of
# what it keeps at 680 tokens, and grow with their square.
MOST = 1024


def attend_segments(
    ends: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float
) -> Tensor:
    """Each scale by itself; `ends` are those of the scales in the sequence."""
    if q.device.type == "cpu" and dropout == 0 and torch.is_grad_enabled():
        return SegmentsOnCPU.apply(q, k, v, tuple(ends), scale)
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


class SegmentsOnCPU(torch.autograd.Function):
    """All scales, with one gradient of all keys and values."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float
    ) -> Tensor:
        way = Whole if q.dtype == torch.float32 or q.shape[2] > MOST else Products
        out, kept = torch.empty_like(q), []
        for queries, keys in spans(ends):
            part, keeps = way.forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], scale)
            out[:, :, queries] = part
            kept.append(keeps)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.ends, ctx.scale, ctx.way = ends, scale, way
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # Many small sums: in float32, whatever their terms are in.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for (queries, keys), keeps in zip(spans(ctx.ends), kept, strict=True):
            of_q, of_k, of_v = ctx.way.backward(
                grad[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                keeps,
                ctx.scale,
            )
            grad_q[:, :, queries] = of_q
            grad_k[:, :, keys] += of_k
            grad_v[:, :, keys] += of_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


class Whole:
    """By the kernels that `scaled_dot_product_attention` takes on a CPU; keeps (B, n, H) sums."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, sums, 0.0, False, scale=scale
        )


class Products:
    """By a product, a softmax and a product; keeps the weights (B, H, n, m).

    For dtypes whose products a CPU computes several times as fast as float32's: those kernels take
    as long in bfloat16 as in float32, and their backward pass four times as long as this one. The
    exponents are computed in float32, as they are there.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):  # which would round the exponents
            exponents = (q.float() * scale) @ k.float().mT
        weights = torch.softmax(exponents, dim=-1, out=exponents).to(v.dtype)
        return weights @ v, weights

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, weights: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_weights = grad @ v.mT
        of_exponents = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return (of_exponents @ k) * scale, (of_exponents.mT @ q) * scale, weights.mT @ grad
