"""Codebooks: from vectors to codes and back.

A codebook answers two questions, `nearest` and `lookup`; the multi-scale quantizer asks them
at every scale and knows nothing else about codes. Here are those that keep a table of codes;
`implicit.py` has codes without one. Two ways to learn the table:

    Codebook       by gradient (VQ-VAE, van den Oord et al., arXiv 1711.00937)
    EMACodebook    as a moving average of the vectors that chose each code (the same paper,
                   appendix A.1)

and what keeps codes from being left unused: a start from data or by k-means (SoundStream,
Zeghidour et al., arXiv 2107.03312, section III-C), restarts of dead codes (Jukebox, Dhariwal et
al., arXiv 2005.00341, section 3.1), search by cosine (ViT-VQGAN, Yu et al., arXiv 2110.04627,
section 3.2), and an entropy that a loss can ask for (MAGVIT-v2, Yu et al., arXiv 2310.05737,
section 3.1). A vector that is not finite has no part in any of it.

    N vectors, V codes, D code dimension
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from var_exp.configurable import Fraction, VocabSize, checked, register_config
from var_exp.distributed.collectives import all_reduce_sum, broadcast, scatter

# Where codes start -> steps of k-means after starting at vectors of the data; None: no start.
STARTS = {"none": None, "data": 0, "kmeans": 10}
KMEANS_VECTORS = 8192  # at most so many


class Entropies(NamedTuple):
    """Of soft assignments of N vectors to V codes, in nats, scalars in [0, ln V].

    each: mean over the vectors of the entropy of one; small where vectors lie at codes.
    mean: entropy of the mean assignment; large where all codes are used alike.
    """

    each: Tensor
    mean: Tensor


class BaseCodebook(nn.Module):
    """What the quantizer asks of V codes of dimension D. Subclasses say which codes these are.

    Raises:
        ValueError: fewer than two codes.
    """

    start_from: str

    @checked
    def __init__(self, vocab_size: VocabSize, code_dim: PositiveInt):
        super().__init__()
        self.vocab_size, self.code_dim = vocab_size, code_dim

    @property
    def rule(self) -> Any:
        """Plain value: all but the parameters that decides which code a vector gets."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the parameters again; called for each scale's own copy."""

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the code of each vector: (N, D) -> (N,) int64, without gradient."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors: (...) int64 -> (..., D)."""
        raise NotImplementedError

    def entropy(self, z: Tensor, temperature: float) -> Entropies:
        """Of softmax(-squared distance / temperature) of vectors (N, D), with gradient."""
        raise NotImplementedError

    @property
    def learns_from_vectors(self) -> bool:
        """Whether `update` does anything, for which vectors of all processes must be collected."""
        return False

    def start(self, vectors: Tensor) -> None:
        """Called once, before the first training step, with vectors (N, D) of its scales.

        They are those of all processes, the same in each, as are those of `update`.
        """

    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Called after each training forward with the vectors (N, D) and their codes (N,)."""


@register_config
class Codebook(BaseCodebook):
    """V code vectors of dimension D, learned by gradient.

    Args:
        vocab_size: V >= 2.
        code_dim: D >= 1.
        cosine: nearest by cosine instead of Euclidean distance. Codes are looked up as stored
            in either case, not normalised.
        decay: of the average counts that restarts go by, in [0, 1).
        restart_below: a code is dead, and moved to a vector of the batch, when its average
            count falls below this share of the uniform count N / V; in [0, 1), 0 never
            restarts. What an optimizer remembers of the code is left as it is.
        start_from: "none" keeps the random initial codes, "data" moves them to vectors of the
            first training batch, "kmeans" on from there to the means of clusters.

    Raises:
        ValueError: fewer than two codes, or a value outside its range.
    """

    average_count: Tensor | None

    @checked
    def __init__(
        self,
        vocab_size: VocabSize,
        code_dim: PositiveInt,
        cosine: bool = False,
        decay: Fraction = 0.98,
        restart_below: Fraction = 0.0,
        start_from: str = "none",
    ):
        super().__init__(vocab_size, code_dim)
        self.start_from = check_start(start_from, STARTS)
        self.cosine, self.decay, self.restart_below = cosine, decay, restart_below
        self.weight = nn.Parameter(torch.empty(vocab_size, code_dim))
        counts = torch.ones(vocab_size) if restart_below > 0 else None  # a buffer if needed
        self.register_buffer("average_count", counts)
        self.reset_parameters()

    @property
    def rule(self) -> Any:
        return self.cosine

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.code_dim**-0.5)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        return self._distance(z, self.weight).argmin(dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.weight)

    def entropy(self, z: Tensor, temperature: float) -> Entropies:
        # From a copy: `update` may move codes before the backward pass, which needs them as
        # they were.
        return entropies(-self._distance(z, self.weight.clone()) / temperature)

    def _distance(self, z: Tensor, weight: Tensor) -> Tensor:
        """Squared distances (N, V); with cosine those of the directions, less a constant."""
        if self.cosine:
            return -2 * F.normalize(z, dim=-1) @ F.normalize(weight, dim=-1).T
        squares = z.square().sum(dim=-1, keepdim=True) + weight.square().sum(dim=-1)
        return squares - 2 * z @ weight.T

    # -- learning from the vectors --------------------------------------------------------

    @property
    def learns_from_vectors(self) -> bool:
        return self.average_count is not None

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        everything = torch.ones_like(self.weight[:, 0], dtype=torch.bool)
        if (steps := STARTS[self.start_from]) is not None:
            self._move(everything, pick(vectors, self.vocab_size))
            self._kmeans(vectors, steps)
        if self.average_count is not None:
            number = finite(vectors).to(vectors).sum()
            self._count_fully(self.average_count, everything, number / self.vocab_size)

    def _kmeans(self, vectors: Tensor, steps: int) -> None:
        order = broadcast(torch.randperm(len(vectors), device=vectors.device))
        sample = vectors[order[:KMEANS_VECTORS]]
        for _ in range(steps):
            count, total = self._sums(sample, self.nearest(sample))
            mean = total / count.clamp(min=1).unsqueeze(1)
            self._move(count > 0, mean)  # a code that nobody chose stays

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        if self.average_count is not None:
            count, _ = self._sums(vectors, indices)
            self.average_count.lerp_(count, 1 - self.decay)
            self._restart(self.average_count, vectors, count.mean())

    def _restart(self, average_count: Tensor, vectors: Tensor, uniform: Tensor) -> None:
        dead = average_count < self.restart_below * uniform
        moved = self._move(dead, pick(vectors, self.vocab_size))
        # A newcomer that nobody chooses is dead again after
        # ln(restart_below) / ln(decay) steps, however many vectors a scale has.
        self._count_fully(average_count, moved, uniform)

    def _move(self, which: Tensor, places: Tensor) -> Tensor:
        """Put the codes `which` (V,) at finite `places` (V, D); returns which were moved."""
        which = which & finite(places)
        self.weight.copy_(torch.where(which.unsqueeze(1), places, self.weight))
        return which

    def _count_fully(self, average_count: Tensor, which: Tensor, uniform: Tensor) -> None:
        """Give the codes `which` (V,) the average count of a code that is used like all."""
        average_count.copy_(torch.where(which, uniform, average_count))

    def _sums(self, vectors: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Finite vectors that chose each code: number (V,), sum (V, D).

        Each process sums its part. All have the very same sums in the end, which they would not
        if each summed everything, in an order that a GPU does not keep to.
        """
        vectors, indices = scatter(vectors), scatter(indices)
        rows = F.pad(vectors, (0, 1), value=1.0)  # (N, D + 1), the last counts
        rows = rows.masked_fill(~finite(vectors).unsqueeze(1), 0)
        sums = rows.new_zeros(self.vocab_size, self.code_dim + 1).index_add_(0, indices, rows)
        sums = all_reduce_sum(sums)
        return sums[:, -1], sums[:, :-1]


@register_config
class EMACodebook(Codebook):
    """Codes that follow the mean of the vectors which chose them.

    Args:
        others: see `Codebook`; `decay` is also that of the means.
    """

    average_count: Tensor
    average_sum: Tensor

    @checked
    def __init__(
        self,
        vocab_size: VocabSize,
        code_dim: PositiveInt,
        cosine: bool = False,
        decay: Fraction = 0.98,
        restart_below: Fraction = 0.03,
        start_from: str = "data",
    ):
        super().__init__(vocab_size, code_dim, cosine, decay, restart_below, start_from)
        self.weight.requires_grad_(False)
        self.register_buffer("average_count", torch.ones(vocab_size))  # whether restarted or not
        self.register_buffer("average_sum", self.weight.detach().clone())

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        count, total = self._sums(vectors, indices)
        self.average_count.lerp_(count, 1 - self.decay)
        self.average_sum.lerp_(total, 1 - self.decay)
        mean = self.average_sum / self.average_count.clamp(min=1e-6).unsqueeze(1)
        self._move(self.average_count >= 1e-6, mean)  # without any count there is no mean
        if self.restart_below > 0:
            self._restart(self.average_count, vectors, count.mean())

    def _count_fully(self, average_count: Tensor, which: Tensor, uniform: Tensor) -> None:
        super()._count_fully(average_count, which, uniform)
        full = self.weight * average_count.unsqueeze(1)
        self.average_sum.copy_(torch.where(which.unsqueeze(1), full, self.average_sum))


def entropies(logits: Tensor) -> Entropies:
    """Of the assignments softmax(logits), (N, V)."""
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    mean = p.mean(dim=0)  # (V,)
    log_mean = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return Entropies(-(p * log_p).sum(dim=-1).mean(), -(mean * log_mean).sum())


def pick(vectors: Tensor, count: int) -> Tensor:
    """`count` of the finite vectors (N, D), drawn without repeats while they last.

    Repeats are spread by a little noise, or two codes would stay equal for ever. All processes
    get the draw of the first one. Rows are not finite where no vector was.
    """
    is_finite = finite(vectors)
    order = torch.randperm(len(vectors), device=vectors.device)
    order = order[(~is_finite[order]).to(torch.uint8).argsort(stable=True)]  # finite ones first
    place = torch.arange(count, device=vectors.device)
    number = is_finite.sum().clamp(min=1)  # stays on the device: reading it would wait for it
    picked = vectors[order[place % number]]  # (count, D)
    noise = 0.1 * picked.std(dim=0, correction=0) * torch.randn_like(picked)
    picked = torch.where((place >= number).unsqueeze(1), picked + noise, picked)
    return broadcast(picked)


def finite(vectors: Tensor) -> Tensor:
    """Which vectors (N, D) are finite, and not so large that sums are not: (N,) bool."""
    return vectors.square().sum(dim=-1).isfinite()


def check_start(start_from: str, known: dict | tuple) -> str:
    """Raise ValueError unless this start is known."""
    if start_from not in known:
        raise ValueError(
            f"codebook: start_from must be one of {', '.join(known)}, got {start_from!r} "
            f"(tokenizer.quantizer.codebook.start_from)"
        )
    return start_from
