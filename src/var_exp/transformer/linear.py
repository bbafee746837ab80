"""Linear layers in float32 by oneDNN.

On x86 processors torch computes convolutions and bfloat16 products by oneDNN, but float32 products
by MKL, which takes twice as long on an AMD processor with AVX-512 (docs/speed.md; not measured on
Intel's). Here they go to oneDNN, too, forward and backward. It is the same arithmetic, summed in
another order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator that `torch.compile` takes on CPUs; None where torch has not both libraries: on a
# Mac, say, it has Apple's own products.
BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if BOTH else None


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if not by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would give the product to MKL though oneDNN is there.

    What does not fit together is torch's, which says so.
    """
    if ONEDNN_LINEAR is None or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting():
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    single = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    shaped = x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and x.numel() > 0
    return single and shaped and (bias is None or bias.shape == weight.shape[:1])


class OneDNNLinear(torch.autograd.Function):
    """A linear layer, whose gradients are linear layers."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return opaque_linear(x, weight, bias)
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (N, O)
        return (
            OneDNNLinear.apply(grad, weight.T, None) if of_x else None,
            OneDNNLinear.apply(rows.T, x.flatten(0, -2).T, None) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


@torch.library.custom_op("var_exp::linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator in compiled code, where torch would refuse weights that are no constants."""
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
