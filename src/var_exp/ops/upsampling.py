"""Doubling a map by nearest neighbour and a 3x3 convolution, as one.

Of the repeated pixels several meet one and the same sum of weights. With the rows a, b, c of a
kernel, rows 2i and 2i + 1 of what comes out are, of rows x of what comes in,

    a x[i - 1] + (b + c) x[i]  =  (a + b + c) x[i] - a (x[i] - x[i - 1])
    (a + b) x[i] + c x[i + 1]  =  (a + b + c) x[i] + c (x[i + 1] - x[i])

and columns likewise. On the left is a transposed convolution: 16 products for each pixel that comes
in, where the convolution of the doubled map takes 36. On the right are three products for two rows,
so 9 for each pixel that comes in.

    B batch, I channels in, O channels out, (H, W) map that comes in
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.ops.convolution import Conv3x3, saves_products


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution.

    On a CPU in fewer products: by differences where `saves_products` allows it, elsewhere as a
    transposed convolution. CUDA may sum that in another order each time.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        weight, bias = self.conv.weight, self.conv.bias
        if saves_products(self.conv, x):
            return upsample_by_differences(x, weight, bias)
        return F.conv_transpose2d(x, folded(weight), bias, stride=2, padding=1)


def folded(weight: Tensor) -> Tensor:
    """The weights (I, O, 4, 4) that meet pixels once, of (O, I, 3, 3) that meet them doubled."""
    a, b, c = weight.transpose(0, 1).unbind(2)  # (I, O, 3) each
    a, b, c = torch.stack((c, b + c, a + b, a), dim=2).unbind(3)  # (I, O, 4) each
    return torch.stack((c, b + c, a + b, a), dim=3)


def upsample_by_differences(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The doubled map, convolved with a padding of 1, in the dtype of x.

    Args:
        x: (B, I, H, W), channels-last.
        weight: (O, I, 3, 3); bias: (O,).

    Returns:
        (B, O, 2H, 2W), channels-last.
    """
    b, _, h, w = x.shape
    out = torch.empty(
        (b, len(weight), 2 * h, 2 * w),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    kernels = [[k.to(x.dtype) for k in row] for row in kernels_of(weight.float())]
    # An image at a time: its sums are then the same whatever comes with it.
    for image, result in zip(x.split(1), out.split(1), strict=True):
        upsample_image(image, kernels, bias.to(x.dtype), result)
    return out


def kernels_of(weight: Tensor) -> list[list[Tensor]]:
    """(O, I, 3, 3) -> 3 x 3 of (O, I, 1, 1), of rows and of columns: their sum, -first, last."""
    weight = weight.permute(2, 3, 0, 1).contiguous()  # (3, 3, O, I)
    a, b, c = weight.unbind(0)  # (3, O, I) each
    rows = [row.unbind(0) for row in (a + b + c, -a, c)]
    return [[k[:, :, None, None] for k in (a + b + c, -a, c)] for a, b, c in rows]


def upsample_image(x: Tensor, kernels: list[list[Tensor]], bias: Tensor, out: Tensor) -> None:
    """Write the doubled and convolved x (1, I, H, W) into out (1, O, 2H, 2W)."""
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
