"""Linear layers by the quickest product that torch has.

On x86 processors torch gives float32 products to MKL, which uses half of what an AMD processor
with AVX-512 can do, and convolutions and bfloat16 products to oneDNN, which uses all of it. So
float32 products go to oneDNN here, too: forward, and both of the backward pass. It is the same
arithmetic, summed in another order; whatever the number of rows, a row is summed in the same one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# None where torch has no MKL: on a Mac, say, it has Apple's own products.
BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
PRODUCT = torch.ops.mkldnn._linear_pointwise if BOTH else None


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether torch would give the product to MKL though oneDNN is there."""
    single = x.dtype == weight.dtype == torch.float32
    on_cpu = x.device.type == "cpu" and x.numel() > 0
    return PRODUCT is not None and single and on_cpu and not torch.is_autocast_enabled("cpu")


class OneDNNLinear(torch.autograd.Function):
    """A linear layer and its gradients, by the operator that `torch.compile` uses on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (N, O)
        return (
            product(grad, weight.T) if of_x else None,
            product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


@torch.library.custom_op("var_exp::product", mutates_args=())
def opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` for `torch.compile`, which takes the operator's weights for constants."""
    return PRODUCT(x, weight, bias, "none", [], "")


@opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I) -> (..., O)."""
    if torch.compiler.is_compiling():
        return opaque_product(x, weight, bias)
    return PRODUCT(x, weight, bias, "none", [], "")
