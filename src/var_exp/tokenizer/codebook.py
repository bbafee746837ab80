"""Codebooks: from vectors to codes and back.

A codebook answers two questions, `nearest` and `lookup`; the multi-scale quantizer asks them
at every scale and knows nothing else about codes. Three ways to learn the codes exist here:

    Codebook       by gradient (VQ-VAE, van den Oord et al., arXiv 1711.00937)
    EMACodebook    as a moving average of the vectors that chose each code (the same paper,
                   appendix A.1), started from data and with dead codes restarted
                   (Jukebox, Dhariwal et al., arXiv 2005.00341, section 3.1)

    N vectors, V codes, D code dimension
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.spec import recorded


@recorded
class Codebook(nn.Module):
    """V code vectors of dimension D, learned by gradient.

    Args:
        vocab_size: V >= 2.
        code_dim: D >= 1.
        cosine: nearest by cosine instead of Euclidean distance. Codes are looked up as stored
            in either case, not normalised.

    Raises:
        ValueError: fewer than two codes.
    """

    def __init__(self, vocab_size: int, code_dim: int, cosine: bool = False):
        super().__init__()
        if vocab_size < 2:
            raise ValueError(
                f"codebook: expected at least 2 codes, got {vocab_size} "
                f"(tokenizer.quantizer.codebook.vocab_size)"
            )
        self.vocab_size, self.code_dim, self.cosine = vocab_size, code_dim, cosine
        self.weight = nn.Parameter(torch.empty(vocab_size, code_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.code_dim**-0.5)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code to each vector: (N, D) -> (N,) int64."""
        if self.cosine:
            return (F.normalize(z, dim=-1) @ F.normalize(self.weight, dim=-1).T).argmax(dim=-1)
        distance = (
            z.square().sum(dim=-1, keepdim=True)
            + self.weight.square().sum(dim=-1)
            - 2 * z @ self.weight.T
        )  # (N, V)
        return distance.argmin(dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors as stored: (...) int64 -> (..., D)."""
        return F.embedding(indices, self.weight)

    def start(self, vectors: Tensor) -> None:
        """Called once, before the first training step, with vectors (N, D) of its scales."""

    def update(self, vectors: Tensor, indices: Tensor) -> None:
        """Called after each training forward with the vectors (N, D) and their codes (N,)."""


@recorded
class EMACodebook(Codebook):
    """Codes that follow the mean of the vectors which chose them.

    Args:
        decay: of the moving averages, in [0, 1).
        restart_below: a code whose average count per step falls below this is replaced by a
            vector of the batch; 0 never restarts.
    """

    def __init__(
        self,
        vocab_size: int,
        code_dim: int,
        cosine: bool = False,
        decay: float = 0.98,
        restart_below: float = 0.03,
    ):
        super().__init__(vocab_size, code_dim, cosine)
        self.decay, self.restart_below = decay, restart_below
        self.weight.requires_grad_(False)
        self.register_buffer("average_count", torch.ones(vocab_size))
        self.register_buffer("average_sum", self.weight.detach().clone())

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Start from vectors of the first batch, so that every code lies where data lies."""
        self.weight.copy_(_pick(vectors, self.vocab_size))
        self.average_count.fill_(1.0)
        self.average_sum.copy_(self.weight)

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        count = torch.bincount(indices, minlength=self.vocab_size).to(vectors.dtype)  # (V,)
        total = torch.zeros_like(self.weight).index_add_(0, indices, vectors)  # (V, D)
        if _distributed():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.average_count.lerp_(count, 1 - self.decay)
        self.average_sum.lerp_(total, 1 - self.decay)
        mean = self.average_sum / self.average_count.clamp(min=1e-6).unsqueeze(1)
        alive = self.average_count >= max(self.restart_below, 1e-6)
        self.weight.copy_(torch.where(alive.unsqueeze(1), mean, self.weight))
        if self.restart_below > 0:
            self._restart(~alive, vectors)

    def _restart(self, dead: Tensor, vectors: Tensor) -> None:
        fresh = _pick(vectors, self.vocab_size)
        self.weight.copy_(torch.where(dead.unsqueeze(1), fresh, self.weight))
        # A full count of one keeps a newcomer alive for about 1 / (1 - decay) steps.
        self.average_count.masked_fill_(dead, 1.0)
        self.average_sum.copy_(torch.where(dead.unsqueeze(1), fresh, self.average_sum))


def _pick(vectors: Tensor, count: int) -> Tensor:
    """`count` of the vectors (N, D), drawn without repeats while they last.

    Repeats are spread by a little noise, or two codes would stay equal for ever. All ranks get
    the draw of rank 0.
    """
    order = torch.randperm(len(vectors), device=vectors.device)
    repeats = -(-count // len(vectors))
    picked = vectors[order.repeat(repeats)[:count]].clone()  # (count, D)
    if repeats > 1:
        spread = vectors.std(dim=0, correction=0)
        picked[len(vectors) :] += 0.1 * spread * torch.randn_like(picked[len(vectors) :])
    if _distributed():
        dist.broadcast(picked, src=0)
    return picked


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
