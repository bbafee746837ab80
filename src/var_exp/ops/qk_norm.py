"""QK-norm: queries and keys as unit vectors, with the gradient written out.

Autograd would go more often over tensors of that size, which a CPU feels.

    B batch, H heads, n tokens, E head dimension
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shorter vectors are divided by this instead of their length, as `F.normalize` does; their gradient
# is that of others.
EPS = 1e-12


def unit_vectors(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """`F.normalize(x, dim=-1) * scale`, in float32 at least, whatever autocast says.

    Args:
        x: (B, H, n, E).
        scale: (1, H, 1, 1), or none.

    Returns:
        (B, H, n, E), float32 where x has less. Its gradient has no gradient.
    """
    return UnitVectors.apply(x, scale)


class UnitVectors(torch.autograd.Function):
    """With y = x / |x| and out = s y, dL/dx = (g - y (g y)) s / |x| and dL/ds is the sum of g y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None) -> Tensor:
        wide = widened(x)
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (B, H, n, 1)
        inverse = lengths.clamp_min(EPS).reciprocal()
        ctx.save_for_backward(x, scale, inverse)
        return wide * scaled(inverse, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scale, inverse = ctx.saved_tensors
        unit = widened(x) * inverse
        along = (grad * unit).sum(dim=-1, keepdim=True)  # (B, H, n, 1)
        of_scale = along.sum(dim=(0, 2), keepdim=True) if ctx.needs_input_grad[1] else None
        of_x = torch.addcmul(grad, unit, along, value=-1) * scaled(inverse, scale)
        return of_x.to(x.dtype), of_scale


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled(inverse: Tensor, scale: Tensor | None) -> Tensor:
    return inverse if scale is None else inverse * scale
