"""Codebooks without a table: codes are the points of a grid, and every one can be computed.

    BitwiseCodebook    two levels in each dimension: the signs of a vector. Lookup-free
                       quantization (LFQ, MAGVIT-v2, Yu et al., arXiv 2310.05737, section 3.1) and
                       binary spherical quantization (BSQ, Zhao et al., arXiv 2406.07548),
                       the codes of Infinity (Han et al., arXiv 2412.04431)
    FSQCodebook        a few levels in each dimension, within bounds (finite scalar
                       quantization, Mentzer et al., arXiv 2309.15505, section 3.1)

A code is magnitude * (digit - centre) * step in each dimension, its index the number with
these digits. The papers have magnitude 1 and let the encoder find the grid. Of residuals, which
shrink from scale to scale, the encoder cannot do that for all scales at once; so the magnitude
is a parameter, the one that a codebook here has, and with a codebook for each scale each scale
has its own. It starts at 1, or where the data are, and is learned by gradient.

    N vectors, D code dimension, L_d levels of dimension d, V = product of L_d codes
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, MinLen
from pydantic import PositiveInt
from torch import Tensor, nn

from var_exp.configurable import checked, register_config
from var_exp.tokenizer.codebook import BaseCodebook, Entropies, check_start, entropies, finite

MAX_VOCAB = 2**16
Levels = Annotated[Sequence[Annotated[int, Ge(3)]], MinLen(1)]


class GridCodebook(BaseCodebook):
    """Codes at all points of a grid.

    Args:
        levels: L_d of each dimension. Dimension 0 is the fastest digit of an index:
            index = digit_0 + L_0 * (digit_1 + L_1 * (digit_2 + ...)).
        centre: the digit that stands for zero, of each dimension.
        step: what a digit is worth at magnitude 1, of each dimension.
        start_from: "none" starts with magnitude 1, "data" with one that suits the vectors of
            the first training batch.

    Raises:
        ValueError: more than 2^16 codes, or an unknown start.
    """

    num_levels: Tensor
    radix: Tensor
    centre: Tensor
    step: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        centre: Sequence[float],
        step: Sequence[float],
        start_from: str,
    ):
        if math.prod(levels) > MAX_VOCAB:
            raise ValueError(
                f"codebook: expected at most {MAX_VOCAB} codes, because the transformer has a "
                f"logit for each, got {math.prod(levels)} of {len(levels)} dimensions "
                f"(tokenizer.quantizer.codebook, tokenizer.encoder.code_dim)"
            )
        super().__init__(math.prod(levels), len(levels))
        self.levels = list(levels)
        self.start_from = check_start(start_from, ("none", "data"))
        self.log_magnitude = nn.Parameter(torch.zeros(1))
        radix = [math.prod(levels[:d]) for d in range(len(levels))]
        grid = {"num_levels": self.levels, "radix": radix, "centre": centre, "step": step}
        for name, values in grid.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)  # (D,)

    @property
    def rule(self) -> Any:
        return type(self).__name__, self.levels

    @property
    def magnitude(self) -> Tensor:
        return self.log_magnitude.exp()  # positive, whatever an optimizer does

    def position(self, z: Tensor) -> Tensor:
        """Where vectors lie between the digits: (N, D) -> (N, D), digits being whole numbers."""
        raise NotImplementedError

    def fitting_magnitude(self, mean_abs: Tensor) -> Tensor:
        """The magnitude for vectors whose elements have this mean absolute value."""
        raise NotImplementedError

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        position = self.position(z).nan_to_num().clamp(min=0).minimum(self.num_levels - 1)
        return (position.round().long() * self.radix).sum(dim=-1)  # (N,)

    def lookup(self, indices: Tensor) -> Tensor:
        digits = indices.unsqueeze(-1) // self.radix % self.num_levels  # (..., D)
        return self.magnitude * self.step * (digits - self.centre)

    def entropy(self, z: Tensor, temperature: float) -> Entropies:
        """As sums over the dimensions, as BSQ has it, without a table of V.

        Distances are those from where `position` puts a vector, for signs the vector itself.
        Squared they are sums over the dimensions, so the digits are independent given the
        vector, and `each` is exact. `mean` takes them as independent also over the vectors: an
        upper bound of the entropy of the mean assignment.
        """
        position, unit = self.position(z), self.magnitude * self.step  # (N, D), (D,)
        dimensions = []
        for d, size in enumerate(self.levels):
            digits = torch.arange(size, device=z.device)
            distance = (unit[d] * (position[:, d : d + 1] - digits)).square()  # (N, L_d)
            dimensions.append(entropies(-distance / temperature))
        each, mean = zip(*dimensions, strict=True)
        add = functools.partial(functools.reduce, operator.add)
        return Entropies(add(each), add(mean))

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        if self.start_from == "data":
            kept = finite(vectors).unsqueeze(1)
            number = kept.to(vectors).sum() * self.code_dim
            mean_abs = vectors.masked_fill(~kept, 0).abs().sum() / number
            fresh = self.fitting_magnitude(mean_abs).log()
            self.log_magnitude.copy_(torch.where(fresh.isfinite(), fresh, self.log_magnitude))


@register_config
class BitwiseCodebook(GridCodebook):
    """V = 2^D codes: the signs of a vector, times magnitude / sqrt(D).

    At magnitude 1 these are the points of BSQ on the unit sphere, at sqrt(D) those of LFQ, -1
    and 1. Bit d of an index, of value 2^d, is set where dimension d is positive.

    Args:
        code_dim: D in 1..16.
        start_from: see `GridCodebook`.

    Raises:
        ValueError: D outside 1..16, or an unknown start.
    """

    @checked
    def __init__(self, code_dim: PositiveInt, start_from: str = "none"):
        width = 2 * code_dim**-0.5
        super().__init__([2] * code_dim, [0.5] * code_dim, [width] * code_dim, start_from)

    def position(self, z: Tensor) -> Tensor:
        return z / (self.magnitude * self.step) + self.centre

    def fitting_magnitude(self, mean_abs: Tensor) -> Tensor:
        """The one of least squared error, whatever the distribution."""
        return self.code_dim**0.5 * mean_abs


@register_config
class FSQCodebook(GridCodebook):
    """Each dimension bounded by a tanh and rounded to one of its levels.

    At magnitude 1 these are the paper's codes, (digit - L // 2) / (L // 2), from -1 to 1 where
    L is odd. Where it is even the tanh is shifted, so that a vector of zeros has code zero. As
    rounding comes after the tanh, it is not always the nearest code that a vector gets.

    Args:
        levels: L_d >= 3 of each dimension; the paper advises 5 or more. D is their number, V
            their product.
        start_from: see `GridCodebook`.

    Raises:
        ValueError: no levels, fewer than 3 in a dimension, more than 2^16 codes, or an unknown
            start.
    """

    radius: Tensor
    shift: Tensor

    @checked
    def __init__(self, levels: Levels = (8, 5, 5, 5), start_from: str = "none"):
        centre = [float(size // 2) for size in levels]
        super().__init__(levels, centre, [1 / c for c in centre], start_from)
        radius = [(size - 1) / 2 for size in levels]
        shift = [math.atanh((c - r) / r) for c, r in zip(centre, radius, strict=True)]
        self.register_buffer("radius", torch.tensor(radius), persistent=False)  # (D,)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)  # (D,)

    def position(self, z: Tensor) -> Tensor:
        return self.radius * (1 + torch.tanh(z / self.magnitude + self.shift))

    def fitting_magnitude(self, mean_abs: Tensor) -> Tensor:
        """About twice the standard deviation: near the least error of 3 to 8 levels."""
        return 2.5 * mean_abs
