"""3x3 convolutions of large maps with half of the products, on a CPU without gradients.

Winograd's minimal filtering F(4, 3) (Lavin and Gray, arXiv 1509.09308, section 4.1), along one axis
alone: four rows that come out take six products of rows with kernels of one row, not twelve. What
is added before and after costs little against them where there are many channels. Of noise it errs
less than three times as much as a plain convolution in float32; in bfloat16, which rounds what is
added, too, less than eight times as much as rounding the result. With infinities it has other NaNs.

    B batch, I channels in, O channels out, (H, W) map
"""

import torch
from torch import Tensor, nn

from var_exp.ops.onednn import Convolution

WIDE = 128  # channels from which on channels-last and, in it, rows are quicker
LARGE = 64 * 64  # pixels of a map
STRIP = 8192  # pixels of each product, so that what is made of them for a moment is soon read again
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
        if not saves_products(self, x):
            return False
        return x.shape[2] * x.shape[3] >= LARGE and x.shape[2] % 4 == 0


def saves_products(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether additions, which are quick where channels are many, may take the place of products.

    On a CPU and without gradients, of what is in channels-last and needs no cast.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else conv.weight.dtype
    if not (x.device.type == conv.weight.device.type == "cpu" and x.dtype == dtype in DTYPES):
        return False
    if x.ndim != 4 or x.shape[1] != conv.in_channels:  # which torch refuses, or knows
        return False
    wide = min(conv.in_channels, conv.out_channels) >= WIDE
    return wide and x.is_contiguous(memory_format=torch.channels_last)


def convolve_by_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d` of finite numbers with a padding of 1, in the dtype of x.

    Args:
        x: (B, I, H, W), channels-last, H a multiple of 4.
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
    rows = min(max(1, STRIP // w), h // 4)
    size = (1, x.shape[1], rows, w)
    kernels = [Convolution(k.to(x.dtype), size, (0, 1)) for k in kernels_of(weight.float())]
    bias = bias.to(x.dtype)
    for image, result in zip(x.split(1), out.split(1), strict=True):
        for first in range(0, h // 4, rows):
            strip = slice(first, min(first + rows, h // 4))
            convolve_strip(image, kernels, bias, result, strip)
    return out


def kernels_of(weight: Tensor) -> list[Tensor]:
    """(O, I, 3, 3) -> six of (O, I, 1, 3): of the points 0, 1, -1, 1/2, -1/2 and infinity.

    The polynomial whose coefficients the three rows are, at each point, over the product of the
    point's differences from the other four.
    """
    last = weight.permute(2, 0, 3, 1).contiguous()  # (3, O, 3, I): in the end channels-last
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
    x: Tensor, kernels: list[Convolution], bias: Tensor, out: Tensor, strip: slice
) -> None:
    """Write some rows of the convolution of x (1, I, H, W) into out (1, O, H, W).

    Of the rows z, a, b, c, d, e around each four a, b, c, d, with products m of the six kernels,

        m0(d - 5/4 b + 1/4 z)
        m1((d - 1/4 b) + (c - 1/4 a)), m2((d - 1/4 b) - (c - 1/4 a))
        m3((d - b) + 1/2 (c - a)), m4((d - b) - 1/2 (c - a))
        m5(e - 5/4 c + 1/4 a)

    the four rows that come out are

        m0 + (m1 + m2) + (m3 + m4)
        (m1 - m2) + 1/2 (m3 - m4)
        (m1 + m2) + 1/4 (m3 + m4)
        (m1 - m2) + 1/8 (m3 - m4) + m5.

    Args:
        strip: which fours of rows.
    """
    every = [x[:, :, i::4] for i in range(4)]
    a, b, c, d = (rows[:, :, strip] for rows in every)
    outs = [out[:, :, i::4][:, :, strip] for i in range(4)]
    even, odd, rows = (torch.empty_like(a, memory_format=torch.channels_last) for _ in range(3))

    def products(i: int, factor: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum and difference of those of even + factor * odd and of even - factor * odd."""
        torch.add(even, odd, alpha=factor, out=rows)
        plus = kernels[i](rows, bias)
        torch.sub(even, odd, alpha=factor, out=rows)
        minus = kernels[i + 1](rows)
        total = plus + minus
        return total, torch.sub(plus, minus, out=minus)

    torch.sub(d, b, alpha=0.25, out=even)
    torch.sub(c, a, alpha=0.25, out=odd)
    sum_of_ones, ones = products(1, 1, bias)
    torch.sub(d, b, out=even)
    torch.sub(c, a, out=odd)
    sum_of_halves, halves = products(3, 0.5)
    torch.add(ones, halves, alpha=0.5, out=outs[1])
    torch.add(sum_of_ones, sum_of_halves, alpha=0.25, out=outs[2])

    torch.sub(d, b, alpha=1.25, out=rows)
    above = every[3][:, :, max(strip.start - 1, 0) : strip.stop - 1]  # nothing above the first row
    rows[:, :, rows.shape[2] - above.shape[2] :].add_(above, alpha=0.25)
    torch.add(sum_of_ones.add_(sum_of_halves), kernels[0](rows), out=outs[0])

    torch.mul(a, 0.25, out=rows)
    rows.sub_(c, alpha=1.25)
    below = every[0][:, :, strip.start + 1 : strip.stop + 1]  # nor below the last
    rows[:, :, : below.shape[2]].add_(below)
    torch.add(ones.add_(halves, alpha=0.125), kernels[5](rows), out=outs[3])
