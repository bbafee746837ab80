"""Rotary position embedding in two dimensions, for token maps of growing size.

RoFormer (Su et al., arXiv 2104.09864, section 3.2) rotates every pair of channels of the queries
and keys by an angle that grows with the token's position: the product of a query and a key then
depends on the two positions through their difference alone, and no norm changes. Here a position
is a point of the image. Half of a head's channels rotate with its row and half with its column, at
the frequencies of Heo et al. (arXiv 2403.13298) for maps, which are short beside texts. Positions
are measured in cells of the finest map, so that a point of the image has the same angles at every
scale, as the scales of Infinity share their coordinates (Han et al., arXiv 2412.04431).

    K scales, L tokens, n tokens of this call, H heads, E head dimension
"""

import torch
from torch import Tensor

from var_exp.scales import ScaleSchedule

BASE = 100.0  # the fastest pair rotates by 1 rad a cell, the slowest by a little over 1 / BASE


def token_positions(schedule: ScaleSchedule) -> Tensor:
    """(row, column) of each token's centre, in cells of the finest map: (L, 2) float32."""
    maps = []
    for size in schedule.sizes:
        rows, columns = (
            (torch.arange(n) + 0.5) * finest / n
            for n, finest in zip(size, schedule.latent_size, strict=True)
        )
        maps.append(torch.cartesian_prod(rows, columns))  # (n_k, 2)
    return torch.cat(maps)


def rotation_table(schedule: ScaleSchedule, head_dim: int) -> Tensor:
    """Cosine and sine of the angle of every pair of channels: (2, L, E / 2) float32.

    The first E / 4 pairs rotate with the row, the others with the column (arXiv 2104.09864,
    equation 15, once for each axis).

    Raises:
        ValueError: a head dimension that 4 does not divide.
    """
    if head_dim % 4:
        raise ValueError(
            f"transformer: rope needs heads whose dimension is divisible by 4, got {head_dim} "
            f"(transformer.rope, transformer.width, transformer.num_heads)"
        )
    frequencies = BASE ** -(torch.arange(0, head_dim, 4) / head_dim)  # (E / 4,)
    angles = token_positions(schedule).unsqueeze(-1) * frequencies  # (L, 2, E / 4)
    angles = angles.flatten(1)  # (L, E / 2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys (B, H, n, E) by the (2, n, E / 2) of their tokens."""
    cos, sin = rotation
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, n, E / 2)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(rotated, dim=-1).flatten(-2)  # (B, H, n, E)
