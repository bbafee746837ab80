"""oneDNN's operators that torch keeps for its compiler, or None where torch lacks them.

They have no gradients, and take weights that are laid out already as the kernels read them, which
torch's own functions do anew at every call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# torch has both libraries or what is here is not taken: a Mac, say, has Apple's own products.
BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def operator(name: str) -> Any:
    return getattr(torch.ops.mkldnn, name, None) if BOTH else None


LINEAR, CONVOLUTION = operator("_linear_pointwise"), operator("_convolution_pointwise")
LAY_OUT_WEIGHT = operator("_reorder_linear_weight")
LAY_OUT_KERNEL = operator("_reorder_convolution_weight")
HAS_BFLOAT16 = BOTH and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes(dtype: torch.dtype) -> bool:
    """Whether the operators compute in it, where there are any."""
    return HAS_BFLOAT16 if dtype == torch.bfloat16 else dtype == torch.float32


def laid_out(weight: Tensor) -> Tensor:
    """A weight (O, I), float32 or bfloat16, for `LINEAR` alone."""
    possible = LAY_OUT_WEIGHT is not None and is_real(weight)
    return LAY_OUT_WEIGHT(weight) if possible else weight


def is_real(weight: Tensor) -> bool:
    """Whether it has numbers: what a rehearsal puts in its place cannot be laid out."""
    return not isinstance(weight, FakeTensor)


class Convolution:
    """`F.conv2d` with one kernel, many times and without gradients: the kernel is laid out once.

    Args:
        kernel: (O, I, h, w), float32 or bfloat16, on a CPU.
        size: (B, I, H, W) of what comes, by which oneDNN chooses; others are computed, too.
        padding: of rows and of columns.
    """

    def __init__(self, kernel: Tensor, size: tuple[int, ...], padding: tuple[int, int]):
        self.kernel, self.padding = kernel, padding
        possible = None not in (CONVOLUTION, LAY_OUT_KERNEL) and computes(kernel.dtype)
        self.laid_out = possible and is_real(kernel)
        if self.laid_out:
            self.kernel = LAY_OUT_KERNEL(kernel, padding, (1, 1), (1, 1), 1, size)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (B, I, H, W) and bias (O,), of the kernel's dtype -> (B, O, H', W')."""
        if not self.laid_out:
            return F.conv2d(x, self.kernel, bias, padding=self.padding)
        ones = (1, 1)
        return CONVOLUTION(x, self.kernel, bias, self.padding, ones, ones, 1, "none", [], "")
