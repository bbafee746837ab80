"""Nearest-neighbour upsampling followed by a 3x3 convolution, as one operator.

Repeated pixels meet sums of weights. With the rows a, b, c of a kernel and the rows x of the input,
the output rows 2i and 2i + 1 are

    a x[i - 1] + (b + c) x[i]  =  (a + b + c) x[i] - a (x[i] - x[i - 1])
    (a + b) x[i] + c x[i + 1]  =  (a + b + c) x[i] + c (x[i + 1] - x[i])

and likewise for columns. The right-hand sides take three products for two rows, so 9 for each input
pixel, where the convolution of the upsampled map takes 36. docs/speed.md has the measurements.

    B batch, I input channels, O output channels, (H, W) input map
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from var_exp.ops.convolution import empty_channels_last, to_channels_last, trades_products


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)`.

    On a CPU without gradients, layers of many channels take a quarter of its products.

    Args:
        x: (B, I, H, W).
        weight: (O, I, 3, 3); bias: (O,).

    Returns:
        (B, O, 2H, 2W).
    """
    x = to_channels_last(x, len(weight))
    if trades_products(x, weight):
        return upsample_by_differences(x, weight, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_by_differences(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`upsample_conv2d` in nine products, in the dtype of x, from and to channels-last."""
    b, _, h, w = x.shape
    out = empty_channels_last(x, (b, len(weight), 2 * h, 2 * w))
    kernels = [[k.to(x.dtype) for k in row] for row in difference_kernels(weight.float())]
    # One image at a time: its sums then do not depend on the rest of the batch.
    for image, result in zip(x.split(1), out.split(1), strict=True):
        upsample_image(image, kernels, bias.to(x.dtype), result)
    return out


def difference_kernels(weight: Tensor) -> list[list[Tensor]]:
    """(O, I, 3, 3) -> 3 x 3 of (O, I, 1, 1), for rows and for columns: the sum, -first, last."""
    weight = weight.permute(2, 3, 0, 1).contiguous()  # (3, 3, O, I)
    a, b, c = weight.unbind(0)  # (3, O, I) each
    rows = [row.unbind(0) for row in (a + b + c, -a, c)]
    return [[k[:, :, None, None] for k in (a + b + c, -a, c)] for a, b, c in rows]


def upsample_image(x: Tensor, kernels: list[list[Tensor]], bias: Tensor, out: Tensor) -> None:
    """Write the upsampled and convolved x (1, I, H, W) to out (1, O, 2H, 2W)."""
    padded = F.pad(x, (1, 1, 1, 1))
    across = padded[:, :, :, 1:] - padded[:, :, :, :-1]  # from column to column, (H + 2, W + 1)
    down = padded[:, :, 1:, 1:-1] - padded[:, :, :-1, 1:-1]  # from row to row, (H + 1, W)
    both = across[:, :, 1:] - across[:, :, :-1]  # (H + 1, W + 1)
    across = across[:, :, 1:-1]  # (H, W + 1)

    first, last = slice(None, -1), slice(1, None)
    middle = F.conv2d(x, kernels[0][0], bias)
    sides = [F.conv2d(across, kernels[0][1 + j]) for j in range(2)]
    for i, rows in enumerate((first, last)):
        row = F.conv2d(down[:, :, rows], kernels[1 + i][0]).add_(middle)
        for j, columns in enumerate((first, last)):
            corner = F.conv2d(both[:, :, rows], kernels[1 + i][1 + j]).add_(sides[j])
            torch.add(row, corner[..., columns], out=out[:, :, i::2, j::2])
