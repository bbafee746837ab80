"""2D convolutions: `torch.nn.Conv2d`, faster on a CPU without gradients.

Layers of many channels run channels-last there. Of these, 3x3 convolutions of large maps use
Winograd's minimal filtering F(4, 3) (Lavin and Gray, arXiv 1509.09308, section 4.1) along the
rows: four output rows take six products of rows with 1x3 kernels instead of twelve. Everything
else is torch's own convolution.

The error on noise is less than three times that of a plain convolution in float32, and less than
eight times that of rounding the result in bfloat16, where the sums are rounded too. Infinities give
other NaNs. docs/speed.md has the measurements.

    B batch, I input channels, O output channels, (H, W) map
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDE = 128  # channels from which channels-last, and in it Winograd, is faster
LARGE = 64 * 64  # pixels of a map
STRIP = 8192  # pixels of each product, so that temporaries stay in the cache
DTYPES = (torch.float32, torch.bfloat16)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with the kernels of this file; it has a bias."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        x = to_channels_last(x, self.out_channels)
        same_size = self.kernel_size == (3, 3) and self.stride == self.padding == (1, 1)
        if same_size and prefers_winograd(x, self.weight):
            return conv2d_winograd(x, self.weight, self.bias)
        return super().forward(x)


def to_channels_last(x: Tensor, channels: int) -> Tensor:
    """The map (B, I, H, W) in the memory format in which a CPU computes `channels` fastest.

    With gradients torch 2.14 is slower channels-last.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.ndim != 4 or channels < WIDE:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def trades_products(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3x3 convolution gains from replacing products by additions.

    It does on a CPU without gradients, for many channels, channels-last, and without a cast.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
    if not (x.device.type == weight.device.type == "cpu" and x.dtype == dtype in DTYPES):
        return False
    fits = x.ndim == 4 and x.shape[1] == weight.shape[1]  # torch raises where it does not
    wide = min(weight.shape[:2]) >= WIDE
    return fits and wide and x.is_contiguous(memory_format=torch.channels_last)


def prefers_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv2d_winograd` is faster than torch's convolution."""
    return trades_products(x, weight) and x[0, 0].numel() >= LARGE and x.shape[2] % 4 == 0


def conv2d_winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` of finite numbers, in the dtype of x.

    Args:
        x: (B, I, H, W), channels-last, H a multiple of 4.
        weight: (O, I, 3, 3); bias: (O,).

    Returns:
        (B, O, H, W), channels-last.
    """
    b, _, h, w = x.shape
    out = empty_channels_last(x, (b, len(weight), h, w))
    rows = min(max(1, STRIP // w), h // 4)
    kernels = [kernel.to(x.dtype) for kernel in winograd_kernels(weight.float())]
    bias = bias.to(x.dtype)
    for image, result in zip(x.split(1), out.split(1), strict=True):
        for first in range(0, h // 4, rows):
            strip = slice(first, min(first + rows, h // 4))
            convolve_strip(image, kernels, bias, result, strip)
    return out


def empty_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised map of the shape, with the dtype and device of x."""
    last = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)


def winograd_kernels(weight: Tensor) -> list[Tensor]:
    """(O, I, 3, 3) -> six of (O, I, 1, 3): at the points 0, 1, -1, 1/2, -1/2 and infinity.

    The value at each point of the polynomial whose coefficients are the three rows, over the
    product of the point's differences from the other four.
    """
    last = weight.permute(2, 0, 3, 1).contiguous()  # (3, O, 3, I): channels-last in the end
    above, same, below = last.permute(0, 1, 3, 2).unsqueeze(3)  # (O, I, 1, 3) each
    ones, halves = above + below, above + below / 4
    return [
        above * 4,
        (ones + same) / 1.5,
        (ones - same) / 1.5,
        (halves + same / 2) / -0.375,
        (halves - same / 2) / -0.375,
        below,
    ]


def convolve_strip(
    x: Tensor, kernels: list[Tensor], bias: Tensor, out: Tensor, strip: slice
) -> None:
    """Write some rows of the convolution of x (1, I, H, W) to out (1, O, H, W).

    With the rows z, a, b, c, d, e around each four a, b, c, d, and products m of the six kernels,

        m0(d - 5/4 b + 1/4 z)
        m1((d - 1/4 b) + (c - 1/4 a)), m2((d - 1/4 b) - (c - 1/4 a))
        m3((d - b) + 1/2 (c - a)), m4((d - b) - 1/2 (c - a))
        m5(e - 5/4 c + 1/4 a)

    the four output rows are

        m0 + (m1 + m2) + (m3 + m4)
        (m1 - m2) + 1/2 (m3 - m4)
        (m1 + m2) + 1/4 (m3 + m4)
        (m1 - m2) + 1/8 (m3 - m4) + m5.

    Args:
        strip: which groups of four rows.
    """
    every = [x[:, :, i::4] for i in range(4)]
    a, b, c, d = (rows[:, :, strip] for rows in every)
    outs = [out[:, :, i::4][:, :, strip] for i in range(4)]
    even, odd, rows = (torch.empty_like(a, memory_format=torch.channels_last) for _ in range(3))

    def convolve(i: int) -> Tensor:
        return F.conv2d(rows, kernels[i], padding=(0, 1))

    def products(i: int, factor: float) -> tuple[Tensor, Tensor]:
        """Sum and difference of those of even + factor * odd and of even - factor * odd."""
        torch.add(even, odd, alpha=factor, out=rows)
        plus = F.conv2d(rows, kernels[i], bias if i == 1 else None, padding=(0, 1))
        torch.sub(even, odd, alpha=factor, out=rows)
        minus = convolve(i + 1)
        total = plus + minus
        return total, torch.sub(plus, minus, out=minus)

    torch.sub(d, b, alpha=0.25, out=even)
    torch.sub(c, a, alpha=0.25, out=odd)
    sum_of_ones, ones = products(1, 1)
    torch.sub(d, b, out=even)
    torch.sub(c, a, out=odd)
    sum_of_halves, halves = products(3, 0.5)
    torch.add(ones, halves, alpha=0.5, out=outs[1])
    torch.add(sum_of_ones, sum_of_halves, alpha=0.25, out=outs[2])

    torch.sub(d, b, alpha=1.25, out=rows)
    above = every[3][:, :, max(strip.start - 1, 0) : strip.stop - 1]  # nothing above the first row
    rows[:, :, rows.shape[2] - above.shape[2] :].add_(above, alpha=0.25)
    torch.add(sum_of_ones.add_(sum_of_halves), convolve(0), out=outs[0])

    torch.mul(a, 0.25, out=rows)
    rows.sub_(c, alpha=1.25)
    below = every[0][:, :, strip.start + 1 : strip.stop + 1]  # nor below the last
    rows[:, :, : below.shape[2]].add_(below)
    torch.add(ones.add_(halves, alpha=0.125), convolve(5), out=outs[3])
