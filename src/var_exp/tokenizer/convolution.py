"""3x3 convolutions of large maps with two thirds of the products, on a CPU without gradients.

Winograd's minimal filtering F(2, 3) (Lavin and Gray, arXiv 1509.09308, section 4.1), along one axis
alone: two rows that come out take four products of rows with kernels of one row, not six. What is
added before and after costs little against them where there are many channels. In float32 it errs
no more than summing all nine; in bfloat16 images lose about half a decibel.

    B batch, I channels in, O channels out, (H, W) map
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 128  # channels from which on a network computes in channels-last
LARGE = 64 * 64  # pixels of a map
DTYPES = (torch.float32, torch.bfloat16)


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of 3x3 with padding, by rows where that is quicker."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.goes_by_rows(x):
            return convolve_by_rows(x, self.weight, self.bias)
        return super().forward(x)

    def goes_by_rows(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else self.weight.dtype
        if not (x.device.type == self.weight.device.type == "cpu" and x.dtype == dtype in DTYPES):
            return False
        if x.ndim != 4 or x.shape[1] != self.in_channels:  # which torch refuses, or knows
            return False
        wide = min(self.in_channels, self.out_channels) >= WIDE
        large = x.shape[2] * x.shape[3] >= LARGE and x.shape[2] % 2 == 0
        return wide and large and x.is_contiguous(memory_format=torch.channels_last)


def convolve_by_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d` of finite numbers with a padding of 1, in the dtype of x.

    Args:
        x: (B, I, H, W), channels-last, H even.
        weight: (O, I, 3, 3); bias: (O,).

    Returns:
        (B, O, H, W), channels-last.
    """
    b, _, h, w = x.shape
    out = torch.empty(
        (b, len(weight), h, w),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    above, same, below = weight.float().unbind(2)  # (O, I, 3) each
    kernels = (above, (above + same + below) / 2, (above - same + below) / 2, below)
    kernels = [kernel.unsqueeze(2).to(x.dtype) for kernel in kernels]  # (O, I, 1, 3) each
    bias = bias.to(x.dtype)
    # Image by image: what is made of one for a moment stays in the processor's cache.
    for image, result in zip(x.split(1), out.split(1), strict=True):
        convolve_image(image, kernels, bias, result)
    return out


def convolve_image(x: Tensor, kernels: list[Tensor], bias: Tensor, out: Tensor) -> None:
    """Write the convolution of x (1, I, H, W) into out (1, O, H, W).

    Of the rows a, b, c, d around an even and an odd row (b, c), with products m of the kernels,

        even = m0(a - c) + m1(b + c) + m2(c - b)
        odd = m1(b + c) - m2(c - b) - m3(b - d).
    """
    even, odd, out_even, out_odd = x[:, :, ::2], x[:, :, 1::2], out[:, :, ::2], out[:, :, 1::2]
    rows = torch.empty_like(even, memory_format=torch.channels_last)
    torch.add(even, odd, out=rows)
    both = F.conv2d(rows, kernels[1], bias, padding=(0, 1))
    torch.sub(odd, even, out=rows)
    between = F.conv2d(rows, kernels[2], padding=(0, 1))
    torch.add(both, between, out=out_even)
    torch.sub(both, between, out=out_odd)
    torch.sub(odd[:, :, :-1], odd[:, :, 1:], out=rows[:, :, 1:])
    torch.neg(odd[:, :, :1], out=rows[:, :, :1])  # above the first row there is nothing
    out_even.add_(F.conv2d(rows, kernels[0], padding=(0, 1)))
    torch.sub(even[:, :, :-1], even[:, :, 1:], out=rows[:, :, :-1])
    rows[:, :, -1:] = even[:, :, -1:]  # nor below the last
    out_odd.sub_(F.conv2d(rows, kernels[3], padding=(0, 1)))
