"""Linear layers: `torch.nn.Linear`, faster on a CPU.

On x86 processors torch computes float32 products by MKL, which is slower than oneDNN on AMD's
(docs/speed.md; not measured on Intel's). Here they go to oneDNN, forward and backward: the same
arithmetic, summed in another order. Without gradients oneDNN also applies GELU within the product.
Everything else is torch's own layer.

    N rows, I input features, O output features
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A Mac's torch, for one, lacks them; its own products are not replaced.
HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
# An operator that torch keeps for its compiler; it has no gradient.
ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if HAS_BOTH else None
HAS_BFLOAT16 = HAS_BOTH and torch.ops.mkldnn._is_mkldnn_bf16_supported()

T = TypeVar("T", bound=Tensor | None)
Casts = dict[tuple[nn.Parameter, torch.dtype], Tensor]
CASTS: ContextVar[Casts | None] = ContextVar("casts", default=None)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if not torch.is_autocast_enabled("cpu") and computes(torch.float32, x, weight, bias):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, cached_cast(weight), cached_cast(bias))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(linear(x, weight, bias), approximate="tanh")` (arXiv 1606.08415)."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype != torch.float64:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        tensors = [tensor.to(dtype) for tensor in (x, cached_cast(weight), cached_cast(bias))]
        if computes(dtype, *tensors):
            return ONEDNN_LINEAR(*tensors, "gelu", [], "tanh")
    return F.gelu(linear(x, weight, bias), approximate="tanh")


def computes(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `ONEDNN_LINEAR` computes the layer of these tensors."""
    if ONEDNN_LINEAR is None or torch.compiler.is_compiling():  # which also holds for an export
        return False
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and HAS_BFLOAT16)):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    fits = x.ndim > 1 and x.numel() > 0 and x.shape[-1] == weight.shape[-1]  # torch raises else
    return fits and all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)


class OneDNNLinear(torch.autograd.Function):
    """A linear layer in float32, whose gradients are linear layers."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ONEDNN_LINEAR(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)  # (N, O), (N, I)
        return (
            OneDNNLinear.apply(grad, weight.T, None) if needs_x else None,
            weight_gradient(rows, inputs) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


def weight_gradient(rows: Tensor, inputs: Tensor) -> Tensor:
    """Gradients of the output (N, O), inputs (N, I) -> gradient of the weight (O, I)."""
    if rows.shape[1] > inputs.shape[1]:  # oneDNN would transpose one slowly: take the smaller
        return weight_gradient(inputs, rows).T.contiguous()
    return OneDNNLinear.apply(rows.T.contiguous(), inputs.T, None)


@contextlib.contextmanager
def cached_weight_casts() -> Iterator[None]:
    """Without gradients, cast each parameter once within this context, not at each call.

    Autocast itself caches casts only of parameters that require gradients, and none in inference
    mode; sampling calls every layer once for each scale. Parameters must not change meanwhile; the
    casts take half of their memory. Compiled code does not use them.
    """
    token = CASTS.set({})
    try:
        yield
    finally:
        CASTS.reset(token)


def cached_cast(tensor: T) -> T | Tensor:
    """A parameter cast as autocast would, within `cached_weight_casts`; else the tensor itself."""
    if torch.compiler.is_compiling() or (casts := CASTS.get()) is None:
        return tensor
    if not isinstance(tensor, nn.Parameter) or tensor.dtype != torch.float32:
        return tensor
    device = tensor.device.type
    available = torch.amp.is_autocast_available(device)  # not on the meta device
    if torch.is_grad_enabled() or not available or not torch.is_autocast_enabled(device):
        return tensor
    key = tensor, torch.get_autocast_dtype(device)
    if key not in casts:
        casts[key] = tensor.to(key[1])
    return casts[key]
