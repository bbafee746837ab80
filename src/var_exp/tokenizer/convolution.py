"""The 3x3 convolutions of the autoencoder, which are nearly all of its work.

In training and on GPUs they are torch's. Without gradients, on a CPU and in float32, wide ones on
large maps take the minimal filtering of Winograd, F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308):
a tile of 4x4 outputs costs 36 multiplications for each pair of channels instead of 144. Its
additions round a little more: 1e-5 of the largest output, where torch's are at 2e-6.

    B batch, I and O channels in and out, (H, W) size of the map, (h, w) = (H, W) / 4 tiles,
    T tiles at once
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE, PATCH = 4, 6  # sides of a tile of outputs and of the patch of inputs that it needs
PLACES = PATCH**2

# Transforms of one axis, for the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, section 4.3).
OF_INPUTS = (  # (6, 6)
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
OF_WEIGHTS = (  # (6, 3)
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OF_OUTPUTS = (  # (4, 6)
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)

# Below these torch's way is as fast (measured with AVX2).
MIN_CHANNELS = 128
MIN_PLACES = 64 * 64  # of a map; the weights are transformed at every call
BYTES_AT_ONCE = 2**22  # of transformed inputs: they are read again at once, from the caches


def arranged(x: Tensor, width: int) -> Tensor:
    """A map (B, C, H, W) laid out as a network of so many channels is quickest on it.

    Channels-last without gradients. With them torch 2.14 is slower that way on a CPU, and for few
    channels it does not pay.
    """
    if torch.is_grad_enabled() or width < MIN_CHANNELS:
        return x
    return x.contiguous(memory_format=torch.channels_last)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size; parameters are those of `nn.Conv2d`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if winograd_pays(x, self.weight):
            return conv3x3_winograd(x, self.weight, self.bias)
        return super().forward(x)


def winograd_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3_winograd` can do this convolution, and sooner than torch's.

    The batch has no say: a sample must be computed alike in all of them.
    """
    h, w = x.shape[-2:]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and h % TILE == w % TILE == 0
        and h * w >= MIN_PLACES
        and min(weight.shape[:2]) >= MIN_CHANNELS
    )


def conv3x3_winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with padding 1, by minimal filtering.

    Args:
        x: (B, I, H, W); H and W are multiples of 4.
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (B, O, H, W) in channels-last layout.
    """
    b, _, h, w = x.shape
    kernels = transform_weights(weight)  # (36, I, O)
    of_inputs, of_outputs = both_axes(OF_INPUTS, x), both_axes(OF_OUTPUTS, x)  # (36, 36), (16, 36)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, I)
    out = x.new_empty(b, h, w, len(weight))
    # By single images and rows of tiles: a batch of another size must not sum in another order.
    for image, target in zip(padded, out, strict=True):
        for rows, patches in strips(image):
            t = patches.shape[2] * patches.shape[3]
            inputs = (of_inputs @ patches.reshape(PLACES, -1)).view(PLACES, t, -1)  # (36, T, I)
            products = torch.bmm(inputs, kernels).view(PLACES, -1)  # (36, T O)
            tiles = (of_outputs @ products).view(TILE, TILE, -1, w // TILE, len(weight))
            places = target[rows].view(-1, TILE, w // TILE, TILE, len(weight))
            torch.add(tiles.permute(2, 0, 3, 1, 4), bias, out=places)
    return out.permute(0, 3, 1, 2)


def strips(image: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The overlapping patches of a padded image (H + 2, W + 2, I), some rows of tiles at a time.

    Yields:
        The rows of the output that they decide, and the patches, (6, 6, rows of tiles, w, I), which
        are a view.
    """
    row, place, _ = image.stride()
    height, width, channels = image.shape
    num_rows, num_columns = height // TILE, width // TILE
    bytes_of_row = PLACES * num_columns * channels * image.element_size()
    step = max(1, BYTES_AT_ONCE // bytes_of_row)
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        patches = image[first * TILE :].as_strided(
            (PATCH, PATCH, count, num_columns, channels), (row, place, TILE * row, TILE * place, 1)
        )
        yield slice(first * TILE, (first + count) * TILE), patches


def transform_weights(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (36, I, O)."""
    o, i = weight.shape[:2]
    transform = both_axes(OF_WEIGHTS, weight)  # (36, 9)
    return (transform @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(PLACES, i, o)


def both_axes(transform: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """The matrix that transforms both axes of a patch at once, its places in one row."""
    matrix = torch.tensor(transform, dtype=torch.float64)
    return torch.kron(matrix, matrix).to(like)
