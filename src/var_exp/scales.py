"""The scale schedule: how an image is cut into token maps of growing size.

Next-scale prediction (Tian et al., arXiv 2404.02905, section 3.1) writes an image as K token
maps; map k has p_k x p_k tokens and is predicted as a whole from all coarser maps. Everything
that has to agree on the order, the size and the place of these tokens asks this file.

    K scales, p_k = (h_k, w_k) sides of scale k, L = sum of h_k * w_k tokens
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

Side = int | Sequence[int]


class ScaleSchedule:
    """Sizes and places of the K token maps, coarse to fine.

    Args:
        patch_nums: one side per scale, an int for a square map or a pair (h, w).

    Raises:
        ValueError: no scale, a side below 1, or a scale that does not grow.
    """

    def __init__(self, patch_nums: Iterable[Side]):
        self.sizes = tuple(_as_size(side) for side in patch_nums)  # K x (h, w)
        if not self.sizes:
            raise ValueError("scales: expected at least one scale, got none (scales.patch_nums)")
        for coarse, fine in zip(self.sizes, self.sizes[1:], strict=False):
            grows = coarse[0] <= fine[0] and coarse[1] <= fine[1] and coarse != fine
            if not grows:
                raise ValueError(
                    f"scales: every scale must be larger than the one before, got {fine} after "
                    f"{coarse} in {self.patch_nums} (scales.patch_nums)"
                )

    @property
    def patch_nums(self) -> list[int | list[int]]:
        """The plain form that configurations and checkpoints hold: a side, or [h, w]."""
        return [h if h == w else [h, w] for h, w in self.sizes]

    @property
    def num_scales(self) -> int:
        return len(self.sizes)

    @cached_property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each scale, h_k * w_k."""
        return tuple(h * w for h, w in self.sizes)

    @property
    def seq_len(self) -> int:
        return sum(self.num_tokens)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latent grid: the last scale."""
        return self.sizes[-1]

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each scale lies in the sequence of L tokens."""
        ends = [sum(self.num_tokens[: k + 1]) for k in range(self.num_scales)]
        return tuple(slice(e - n, e) for e, n in zip(ends, self.num_tokens, strict=True))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What a scale is called in metric keys: its side, or HxW where it is not square."""
        return tuple(str(h) if h == w else f"{h}x{w}" for h, w in self.sizes)

    def level_ids(self) -> Tensor:
        """The scale (0-based) that each of the L tokens belongs to: (L,) int64."""
        return torch.cat([torch.full((n,), k) for k, n in enumerate(self.num_tokens)])

    def split(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """Cut a sequence that starts at scale 0 and ends at a scale's border into its scales.

        Raises:
            ValueError: the length is not that of the first k scales for any k.
        """
        return list(x.split(self.num_tokens[: self.num_scales_in(x.shape[dim])], dim=dim))

    def num_scales_in(self, length: int) -> int:
        """How many whole scales a prefix of `length` tokens holds.

        Raises:
            ValueError: the prefix ends inside a scale.
        """
        ends = [0] + [s.stop for s in self.slices]
        if length not in ends:
            raise ValueError(
                f"tokens: a length of {length} ends inside a scale; whole scales of "
                f"{self.patch_nums} end at {ends}"
            )
        return ends.index(length)

    def check_image(self, image_size: Side, stride: int) -> None:
        """Raise ValueError unless the last scale is the latent grid of such an image."""
        h, w = _as_size(image_size)
        if (h, w) != (self.latent_size[0] * stride, self.latent_size[1] * stride):
            raise ValueError(
                f"scales: the last scale {self.latent_size} must be image size / stride = "
                f"({h}, {w}) / {stride} = ({h / stride:g}, {w / stride:g}); change "
                f"scales.patch_nums, data.image_size or the tokenizer's multipliers"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScaleSchedule) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __repr__(self) -> str:
        return f"ScaleSchedule({self.patch_nums})"


def total_tokens(scales: Iterable[Side]) -> int:
    """Length L of the token sequence of a schedule: the sum of the squares of its sides."""
    return ScaleSchedule(scales).seq_len


def _as_size(side: Side) -> tuple[int, int]:
    pair = tuple(side) if isinstance(side, Sequence) else (side, side)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair)
    if len(pair) != 2 or not whole:
        raise ValueError(
            f"scales: a side must be a whole number >= 1 or a pair of them, got {side!r} "
            f"(scales.patch_nums)"
        )
    return pair
