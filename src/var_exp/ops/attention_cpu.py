"""Attention scale by scale: the queries of each see the keys of all scales so far, and no mask.

On a CPU the backward pass is written out. Autograd would make the gradients of keys and values anew
for each scale, padded with zeros, and add them up; here there is one of each, to which every scale
adds its part. The forward pass comes in two ways (`Flash`, `Products`), by the dtype.

    B batch, H heads, L tokens, n tokens of a scale, m tokens up to its end, E head dimension
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from var_exp.ops import attention_cpu as segments
from var_exp.ops import onednn

# Tokens up to which `Products` may keep its weights, which grow with their square.
MOST_TOKENS = 1024

HAS_TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# Held while `products` sets what is the whole process's: a second thread would restore the first's.
SETTING = threading.Lock()


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
        kernel = Products if q.dtype == torch.bfloat16 and q.shape[2] <= MOST_TOKENS else Flash
        out, kept = torch.empty_like(q), []
        q, k, v = kernel.arranged(q, k, v)
        for queries, keys in spans(ends):
            part, keeps = kernel.forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], scale)
            out[:, :, queries] = part
            kept.append(keeps)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.ends, ctx.scale, ctx.kernel = ends, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        (grad,) = ctx.kernel.arranged(grad)
        grad_q = torch.empty_like(q)
        # Many small sums: in float32, whatever their terms are in.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for (queries, keys), keeps in zip(spans(ctx.ends), kept, strict=True):
            of_q, of_k, of_v = ctx.kernel.backward(
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


class Flash:
    """By the kernels that `scaled_dot_product_attention` takes; keeps logarithms (B, n, H)."""

    @staticmethod
    def arranged(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sums, 0.0, False, scale=scale
        )


class Products:
    """By a product, a softmax and a product; keeps the weights (B, H, n, m).

    For bfloat16, by which those kernels gain nothing. The exponents are in float32, as they are
    there.
    """

    @staticmethod
    def arranged(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Each head's tokens together in memory: products of some of them then need no copy."""
        return tuple(tensor.contiguous() for tensor in tensors)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        exponents = products(q, k)
        if scale != 1:
            exponents.mul_(scale)
        weights = exponents.softmax(dim=-1).to(v.dtype)
        return weights @ v, weights

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, weights: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_weights = grad @ v.mT
        of_exponents = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return (of_exponents @ k) * scale, (of_exponents.mT @ q) * scale, weights.mT @ grad


@torch.library.custom_op("var_exp::products", mutates_args=())
def products(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, n, E) and k (B, H, m, E) in bfloat16 -> their products (B, H, n, m) in float32.

    Where the processor multiplies tiles of bfloat16, oneDNN may round the factors to that, which
    they are already, so that nothing is lost. An operator of its own, since `torch.compile` cannot
    look into such a setting.
    """
    with torch.autocast("cpu", enabled=False):  # which would round the products
        if not HAS_TILES:
            return q.float() @ k.float().mT
        matmul = torch.backends.mkldnn.matmul
        with SETTING:
            before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            try:
                return q.float() @ k.float().mT
            finally:
                matmul.fp32_precision = before


@products.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], k.shape[-2], dtype=torch.float32)


# Of attention by products: from how many tokens of a scale it pays, about how many weights are made
# at a time, so that they stay in the processor's cache, and up to how many of one head.
MANY, WEIGHTS, MOST_OF_A_HEAD = 64, 750_000, 2**21


def by_products(q: Tensor, end: int) -> bool:
    """Whether `Products` are quicker, as they are where a processor multiplies bfloat16 by vectors.

    With tiles it was not measured.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not onednn.HAS_BFLOAT16 or segments.HAS_TILES:
        return False
    fits = q.shape[2] >= MANY and q.shape[2] * end <= MOST_OF_A_HEAD
    return fits and q.device.type == "cpu" and q.dtype == torch.bfloat16


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A few heads at a time: q (B, H, n, E), k and v (B, H, m, E) -> (B, H, n, E)."""
    few = max(1, WEIGHTS // (q.shape[2] * k.shape[2]))
    parts = zip(*(heads.flatten(0, 1).split(few) for heads in (q, k, v)), strict=True)
    out = torch.cat([segments.Products.forward(*part, scale)[0] for part in parts])
    return out.unflatten(0, q.shape[:2])
