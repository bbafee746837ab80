"""Linear layers by oneDNN.

On x86 processors torch computes convolutions and bfloat16 products by oneDNN, but float32 products
by MKL, which takes up to twice as long on AMD's processors (docs/speed.md; not measured on
Intel's). Here they go to oneDNN, too, forward and backward. It is the same arithmetic, summed in
another order. In bfloat16 oneDNN adds the bias within the product; torch writes it into the result
beforehand, which is one more pass over it.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.ops import onednn

GELU = 2 * math.sqrt(2 / math.pi)  # of `linear_gelu`

# Of `cast_once`: a parameter and what it was cast to, by its id, the dtype and how it lies.
Casts = dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]]
CASTS: ContextVar[Casts | None] = ContextVar("casts", default=None)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextlib.contextmanager
def cast_once() -> Iterator[None]:
    """Within it, and without gradients, a parameter is cast once, not at each call of its layer.

    Autocast itself keeps what it has cast for parameters that are trained, and nothing in inference
    mode; sampling calls every layer once for each scale. What oneDNN multiplies by is laid out as
    its kernels read it, too. Parameters must not change meanwhile, and take half of their memory
    again. Compiled code casts them as before.
    """
    before = CASTS.set({})
    try:
        yield
    finally:
        CASTS.reset(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    dtype = onednn_dtype(x, weight, bias)
    weight, bias = already_cast(weight, laid_out=dtype is not None), already_cast(bias)
    if dtype is None:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear`, then GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).

    A CPU's tanh takes its time. Where no gradient is asked for it is computed within the product;
    in compiled code as x sigmoid(2 u), which is the same as x (1 + tanh(u)) / 2 and has a quicker
    exponential.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype != torch.float64:
        y = linear(x, weight, bias)
        z = y.float()
        return (z * torch.sigmoid(z * (GELU + GELU * 0.044715 * z * z))).to(y.dtype)
    dtype = None if torch.is_grad_enabled() else onednn_dtype(x, weight, bias)
    if dtype is None:
        return F.gelu(linear(x, weight, bias), approximate="tanh")
    weight, bias = already_cast(weight, laid_out=True), already_cast(bias)
    return onednn.LINEAR(x.to(dtype), weight.to(dtype), bias.to(dtype), "gelu", [], "tanh")


def already_cast(tensor: Tensor | None, laid_out: bool = False) -> Tensor | None:
    """A parameter as autocast would cast it, from `cast_once`; elsewhere the tensor itself.

    Args:
        laid_out: for oneDNN alone, which otherwise lays out a weight at each call.
    """
    if torch.compiler.is_compiling() or (casts := CASTS.get()) is None:
        return tensor
    parameter = isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32
    if not parameter or torch.is_grad_enabled():
        return tensor
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    dtype = torch.get_autocast_dtype(device)
    key = id(tensor), dtype, laid_out
    if key not in casts:
        cast = tensor.to(dtype)
        # The tensor is held, so that its id stays its own.
        casts[key] = tensor, onednn.laid_out(cast) if laid_out else cast
    return casts[key][1]


def onednn_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What oneDNN computes the product in; None for what is torch's.

    That is also what does not fit together: torch says so.
    """
    if onednn.LINEAR is None or torch.compiler.is_exporting():
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    shaped = x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and x.numel() > 0
    shaped = shaped and (bias is None or bias.shape == weight.shape[:1])
    if not shaped or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.is_autocast_enabled("cpu"):
        dtype, fits = torch.get_autocast_dtype("cpu"), dtypes <= {torch.float32, torch.bfloat16}
    else:
        dtype, fits = x.dtype, len(dtypes) == 1
    return dtype if fits and onednn.computes(dtype) else None


class OneDNNLinear(torch.autograd.Function):
    """A linear layer, whose gradients are linear layers."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return opaque_linear(x, weight, bias)
        return onednn.LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)  # (N, O), (N, I)
        return (
            OneDNNLinear.apply(grad, weight.T, None) if of_x else None,
            weight_gradient(rows, inputs) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def weight_gradient(rows: Tensor, inputs: Tensor) -> Tensor:
    """Gradients of what comes out (N, O), what goes in (N, I) -> that of the weight (O, I)."""
    if rows.dtype == torch.bfloat16:  # by oneDNN already, and quicker than as a layer
        return rows.T @ inputs
    if rows.shape[1] > inputs.shape[1]:  # oneDNN would turn one, and takes its time: the smaller
        return weight_gradient(inputs, rows).T.contiguous()
    return OneDNNLinear.apply(rows.T.contiguous(), inputs.T, None)


@torch.library.custom_op("var_exp::linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator in compiled code, where torch would refuse weights that are no constants."""
    return onednn.LINEAR(x, weight, bias, "none", [], "")


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
