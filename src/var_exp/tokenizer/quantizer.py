"""The multi-scale residual quantizer: one feature map, K maps of codes.

VAR (arXiv 2404.02905, section 3.2, algorithms 1 and 2). Coarse to fine, each scale quantizes
what the coarser ones left over. `upsample_codes` (codes -> their part of the feature map) and
`nearest` (vectors -> codes) are the only places where the method's equation stands: encoding,
decoding, teacher forcing and sampling all go through them, so that they agree by construction.

    B batch, K scales, (h_k, w_k) sides of scale k, L tokens, V codes, D code dimension,
    (H, W) = (h_K, w_K) latent grid, f features (B, D, H, W), f_hat their reconstruction
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.scales import ScaleSchedule, Side
from var_exp.spec import recorded
from var_exp.tokenizer.codebook import Codebook


class Quantized(NamedTuple):
    """What quantizing a feature map gives.

    f_hat: (B, D, H, W), its value that of the codes, its gradient that of f (straight-through).
    indices: K tensors (B, h_k * w_k) int64.
    loss: scalar, the codebook and commitment loss.
    """

    f_hat: Tensor
    indices: list[Tensor]
    loss: Tensor


@recorded
class MultiScaleQuantizer(nn.Module):
    """Quantize features over a schedule of scales.

    Args:
        patch_nums: the schedule.
        codebook: the codes, shared by all scales (the paper) or, with `per_scale`, the pattern
            of which each scale gets an own copy.
        per_scale: a codebook for each scale.
        num_phi: how many phi convolutions serve the K scales: 1 is fully shared, K one each,
            4 the published tokenizer (also where K < 4).
        phi_ratio: share of the convolution in phi, in [0, 1].
        beta: weight of the commitment term.
        scale_drop: share of training batches that are decoded from a random prefix of the
            scales, so that coarse scales carry what they can.

    Raises:
        ValueError: num_phi outside 1..max(K, 4).
    """

    def __init__(
        self,
        patch_nums: Sequence[Side],
        codebook: Codebook,
        per_scale: bool = False,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        scale_drop: float = 0.0,
    ):
        super().__init__()
        self.schedule = ScaleSchedule(patch_nums)
        num_scales = self.schedule.num_scales
        if not 1 <= num_phi <= max(num_scales, 4):
            raise ValueError(
                f"quantizer: num_phi must be in 1..{max(num_scales, 4)} (1 shared, 4 as "
                f"published, {num_scales} one per scale), got {num_phi} "
                f"(tokenizer.quantizer.num_phi)"
            )
        self.vocab_size, self.code_dim = codebook.vocab_size, codebook.code_dim
        self.phi_ratio, self.beta, self.scale_drop = phi_ratio, beta, scale_drop
        self.codebooks = nn.ModuleList([codebook])
        for _ in range(num_scales - 1 if per_scale else 0):
            self.codebooks.append(copy.deepcopy(codebook))
            self.codebooks[-1].reset_parameters()
        self.phis = nn.ModuleList(
            nn.Conv2d(self.code_dim, self.code_dim, kernel_size=3, padding=1)
            for _ in range(num_phi)
        )
        self.phi_of_scale = assign_phis(num_scales, num_phi)
        self.register_buffer("started", torch.tensor(False))
        self._register_resizes()

    # -- the equation ---------------------------------------------------------------------

    def nearest(self, z: Tensor, k: int) -> Tensor:
        """Codes of the vectors of scale k: (B, D, h_k, w_k) -> (B, h_k * w_k) int64."""
        vectors = z.permute(0, 2, 3, 1).reshape(-1, self.code_dim)  # (B h_k w_k, D)
        return self.codebook(k).nearest(vectors).view(len(z), -1)

    def upsample_codes(self, indices: Tensor, k: int) -> Tensor:
        """What the codes of scale k add to f_hat: (B, h_k * w_k) -> (B, D, H, W)."""
        h, w = self.schedule.sizes[k]
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.codebook(k).lookup(indices)  # (B, h_k w_k, D)
            codes = codes.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h_k, w_k)
            return self.phi(self._resize(codes, "up", k), k)  # (B, D, H, W)

    # -- everything else is told in terms of it -------------------------------------------

    def forward(self, f: Tensor) -> Quantized:
        """Quantize with losses; in training mode codebooks learn and scales may be dropped."""
        with torch.autocast(f.device.type, enabled=False):
            return self._forward(f.float())

    def _forward(self, f: Tensor) -> Quantized:
        if self.training and not self.started:
            self._start(f.detach())
        keep = self._scales_to_keep()
        indices, seen, loss, f_hat, output = [], [], f.new_zeros(()), 0.0, None
        for k, (idx, z, h) in enumerate(self._residual_steps(f)):
            f_hat = f_hat + h  # (B, D, H, W)
            commitment = F.mse_loss(f, f_hat.detach())
            loss = loss + self.beta * commitment + F.mse_loss(f_hat, f.detach())
            indices.append(idx)
            seen.append(z)
            if k + 1 == keep:
                output = f_hat
        if self.training:
            self._update(seen, indices)
        output = f + (output - f).detach()  # straight-through
        return Quantized(output, indices, loss / self.schedule.num_scales)

    @torch.no_grad()
    def encode(self, f: Tensor) -> list[Tensor]:
        """Features (B, D, H, W) -> K tensors of codes (B, h_k * w_k)."""
        with torch.autocast(f.device.type, enabled=False):
            return [indices for indices, _, _ in self._residual_steps(f.float())]

    def partial_sums(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """f_hat (B, D, H, W) after each of the given scales, which start at the coarsest."""
        f_hat = None
        for k, idx in enumerate(indices):
            part = self.upsample_codes(idx, k)
            f_hat = part if f_hat is None else f_hat + part
            yield f_hat

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """What the transformer reads to predict scale k: (B, D, H, W) -> (B, h_k * w_k, D)."""
        with torch.autocast(f_hat.device.type, enabled=False):
            return self._resize(f_hat, "down", k).flatten(2).transpose(1, 2)

    def teacher_forcing_input(self, indices: Sequence[Tensor]) -> Tensor:
        """Transformer inputs of every scale after the first that the given codes determine.

        Args:
            indices: codes (B, h_k * w_k) of the first n >= 1 scales.

        Returns:
            (B, L - h_1 * w_1, D) when all K scales are given (the last does not matter); the
            inputs of scales 2..n + 1 when n < K are.
        """
        determined = indices[: self.schedule.num_scales - 1]
        if not determined:
            return self.codebook(0).lookup(indices[0][:, :0])  # one scale: (B, 0, D)
        sums = self.partial_sums(determined)
        inputs = [self.next_input(f_hat, k + 1) for k, f_hat in enumerate(sums)]
        return torch.cat(inputs, dim=1)

    # -- parts ----------------------------------------------------------------------------

    def codebook(self, k: int) -> Codebook:
        return self.codebooks[k if len(self.codebooks) > 1 else 0]

    def phi(self, h: Tensor, k: int) -> Tensor:
        conv = self.phis[self.phi_of_scale[k]]
        return (1 - self.phi_ratio) * h + self.phi_ratio * conv(h)

    def _residual_steps(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each scale its codes, the vectors that chose them, and its part of f_hat."""
        residual = f.detach()
        for k in range(self.schedule.num_scales):
            z = self._resize(residual, "down", k)  # (B, D, h_k, w_k)
            indices = self.nearest(z, k)
            h = self.upsample_codes(indices, k)  # (B, D, H, W)
            residual = residual - h.detach()
            yield indices, z, h

    def _scales_to_keep(self) -> int:
        num_scales = self.schedule.num_scales
        may_drop = self.training and self.scale_drop > 0 and num_scales > 1
        if may_drop and torch.rand(()) < self.scale_drop:
            return int(torch.randint(1, num_scales, ()))
        return num_scales

    def _start(self, f: Tensor) -> None:
        """Start each codebook from the vectors that its own scales see."""
        zs = []
        residual = f
        for k in range(self.schedule.num_scales):
            z = self._resize(residual, "down", k)
            zs.append(z)
            if len(self.codebooks) > 1:
                self.codebook(k).start(_vectors(z))
                residual = residual - self.upsample_codes(self.nearest(z, k), k).detach()
        if len(self.codebooks) == 1:
            self.codebook(0).start(torch.cat([_vectors(z) for z in zs]))
        self.started.fill_(True)

    def _update(self, zs: list[Tensor], indices: list[Tensor]) -> None:
        if len(self.codebooks) > 1:
            for codebook, z, idx in zip(self.codebooks, zs, indices, strict=True):
                codebook.update(_vectors(z), idx.flatten())
        else:
            vectors = torch.cat([_vectors(z) for z in zs])
            self.codebook(0).update(vectors, torch.cat([i.flatten() for i in indices]))

    def _register_resizes(self) -> None:
        latent = self.schedule.latent_size
        for k, size in enumerate(self.schedule.sizes):
            for axis in range(2):
                down, up = (
                    area_matrix(latent[axis], size[axis]),
                    bicubic_matrix(size[axis], latent[axis]),
                )
                self.register_buffer(f"down_{k}_{axis}", down, persistent=False)
                self.register_buffer(f"up_{k}_{axis}", up, persistent=False)

    def _resize(self, x: Tensor, direction: str, k: int) -> Tensor:
        if self.schedule.sizes[k] == self.schedule.latent_size:
            return x
        rows = getattr(self, f"{direction}_{k}_0")  # (out_h, in_h)
        columns = getattr(self, f"{direction}_{k}_1")  # (out_w, in_w)
        return rows @ x @ columns.T


def _vectors(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)


def area_matrix(source: int, target: int) -> Tensor:
    """PyTorch's area resize of one axis as a matrix (target, source)."""
    eye = torch.eye(source, dtype=torch.float64).unsqueeze(0)
    return F.adaptive_avg_pool1d(eye, target)[0].T.contiguous().float()


def bicubic_matrix(source: int, target: int) -> Tensor:
    """PyTorch's bicubic resize of one axis (a = -0.75, half-pixel) as a matrix (target, source).

    A matrix product has a deterministic backward on every device; `interpolate` has not.
    """
    eye = torch.eye(source, dtype=torch.float64).view(1, source, source, 1)
    up = F.interpolate(eye, size=(target, 1), mode="bicubic", align_corners=False)
    return up[0, :, :, 0].T.contiguous().float()


def assign_phis(num_scales: int, num_phi: int) -> list[int]:
    """Which phi serves each scale, as the published code assigns them.

    The nearest of evenly spaced ticks in [0, 1], in float64 on purpose: its rounding decides
    the ties at 5 and 10 scales, and the published weights were trained with that decision.
    """
    if num_phi == num_scales:
        return list(range(num_scales))
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    places = [k / max(num_scales - 1, 1) for k in range(num_scales)]
    return [int(np.argmin(np.abs(ticks - place))) for place in places]
