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

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from var_exp.configurable import Share, Weight, check_value, checked, register_config
from var_exp.distributed.collectives import all_gather
from var_exp.scales import ScaleSchedule, Side
from var_exp.tokenizer.codebook import BaseCodebook
from var_exp.tokenizer.resize import Resize, assign_phis


class Quantized(NamedTuple):
    """What quantizing a feature map gives.

    f_hat: (B, D, H, W), its value that of the codes, its gradient that of f (straight-through).
    indices: K tensors (B, h_k * w_k) int64.
    loss: scalar, the codebook and commitment loss, and the entropy term where it is on.
    """

    f_hat: Tensor
    indices: list[Tensor]
    loss: Tensor


class Corrupted(NamedTuple):
    """Codes with mistakes, and what corrects them: each K tensors (B, h_k * w_k) int64.

    targets: at each scale the nearest codes of what the coarser codes of `seen` left over.
    seen: the same with a share of the codes replaced, at each scale before the next.
    """

    targets: list[Tensor]
    seen: list[Tensor]


class Step(NamedTuple):
    """One scale of the residual loop.

    nearest, used: codes (B, h_k * w_k) int64; z: the vectors (B, D, h_k, w_k) that chose the
    nearest; part: what the used ones add to f_hat, (B, D, H, W).
    """

    nearest: Tensor
    used: Tensor
    z: Tensor
    part: Tensor


@register_config
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
        quantizer_dropout: share of training batches that are decoded from a random prefix of the
            scales, so that coarse scales carry what they can (quantizer dropout, SoundStream,
            arXiv 2107.03312, section III-C).
        quantizer_dropout_from: how many scales a prefix always has, in 1..K (3 in XQ-GAN,
            arXiv 2412.01762).
        entropy: weight of the entropy term, in training only: mean entropy of the soft
            assignment of each vector less the entropy of their mean assignment (MAGVIT-v2,
            arXiv 2310.05737, section 3.1), averaged over the scales. It asks for vectors near
            their codes and for codes that are used alike. A table of codes costs N x V numbers
            at each scale. Processes have each the mean assignment of their own batch.
        entropy_temperature: of the softmax over negative squared distances, > 0.

    Raises:
        ValueError: a value outside its range.
    """

    started: Tensor
    codebooks: Sequence[BaseCodebook]

    @checked
    def __init__(
        self,
        patch_nums: Sequence[Side],
        codebook: BaseCodebook,
        per_scale: bool = False,
        num_phi: PositiveInt = 4,
        phi_ratio: Share = 0.5,
        beta: Weight = 0.25,
        quantizer_dropout: Share = 0.0,
        quantizer_dropout_from: PositiveInt = 1,
        entropy: Weight = 0.0,
        entropy_temperature: PositiveFloat = 0.01,
    ):
        super().__init__()
        self.schedule = ScaleSchedule(patch_nums)
        num_scales = self.schedule.num_scales
        most, scales = max(num_scales, 4), f"in 1..{num_scales}, the number of scales"
        phis = f"in 1..{most} (1 shared, 4 as published, {num_scales} one per scale)"
        for name, value, expected, largest in (
            ("num_phi", num_phi, phis, most),
            ("quantizer_dropout_from", quantizer_dropout_from, scales, num_scales),
        ):
            if value > largest:
                raise ValueError(
                    f"quantizer: {name} must be {expected}, got {value} "
                    f"(tokenizer.quantizer.{name})"
                )
        self.vocab_size, self.code_dim = codebook.vocab_size, codebook.code_dim
        self.phi_ratio, self.beta = phi_ratio, beta
        self.quantizer_dropout, self.quantizer_dropout_from = (
            quantizer_dropout,
            quantizer_dropout_from,
        )
        self.entropy, self.entropy_temperature = entropy, entropy_temperature
        copies = [copy.deepcopy(codebook) for _ in range(num_scales - 1 if per_scale else 0)]
        for own in copies:
            own.reset_parameters()
        # A ModuleList's type cannot say of what it is.
        self.codebooks = nn.ModuleList([codebook, *copies])  # type: ignore[assignment]
        self.phis = nn.ModuleList(
            nn.Conv2d(self.code_dim, self.code_dim, kernel_size=3, padding=1)
            for _ in range(num_phi)
        )
        self.phi_of_scale = assign_phis(num_scales, num_phi)
        self.register_buffer("started", torch.tensor(False))
        self.resize = Resize(self.schedule)

    # -- the equation ---------------------------------------------------------------------

    def nearest(self, z: Tensor, k: int) -> Tensor:
        """Codes of the vectors of scale k: (B, D, h_k, w_k) -> (B, h_k * w_k) int64."""
        return self.codebook(k).nearest(_vectors(z)).view(len(z), -1)

    def upsample_codes(self, indices: Tensor, k: int) -> Tensor:
        """What the codes of scale k add to f_hat: (B, h_k * w_k) -> (B, D, H, W)."""
        h, w = self.schedule.sizes[k]
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.codebook(k).lookup(indices)  # (B, h_k w_k, D)
            codes = codes.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h_k, w_k)
            return self.phi(self.resize.up(codes, k), k)  # (B, D, H, W)

    # -- everything else is told in terms of it -------------------------------------------

    def forward(self, f: Tensor) -> Quantized:
        """Quantize with losses; in training mode codebooks learn and scales may be dropped."""
        with torch.autocast(f.device.type, enabled=False):
            return self._forward(f.float())

    def _forward(self, f: Tensor) -> Quantized:
        if self.training and not self.started:
            self._start(all_gather(f.detach()))
        keep = self._scales_to_keep()
        with_entropy = self.training and self.entropy > 0  # the one that pulls at the vectors
        steps: list[Step] = []
        loss = f_hat = output = f.new_zeros(())
        for k, step in enumerate(self._residual_steps(f if with_entropy else f.detach())):
            f_hat = f_hat + step.part  # (B, D, H, W)
            commitment = F.mse_loss(f, f_hat.detach())
            loss = loss + self.beta * commitment + F.mse_loss(f_hat, f.detach())
            if with_entropy:
                each, mean = self.codebook(k).entropy(_vectors(step.z), self.entropy_temperature)
                loss = loss + self.entropy * (each - mean)
            steps.append(step)
            if k + 1 == keep:
                output = f_hat
        indices = [step.nearest for step in steps]
        if self.training and self.codebook(0).learns_from_vectors:
            zs = [all_gather(step.z.detach()) for step in steps]
            self._update(zs, [all_gather(idx) for idx in indices])
        output = f + (output - f).detach()  # straight-through
        return Quantized(output, indices, loss / self.schedule.num_scales)

    @torch.no_grad()
    def encode(self, f: Tensor) -> list[Tensor]:
        """Features (B, D, H, W) -> K tensors of codes (B, h_k * w_k)."""
        with torch.autocast(f.device.type, enabled=False):
            return [step.nearest for step in self._residual_steps(f.float())]

    @torch.no_grad()
    def encode_corrupted(self, f: Tensor, share: float) -> Corrupted:
        """Encode with mistakes at each scale, which the finer scales correct.

        For training a transformer on what it meets in sampling, where its own coarse codes are
        not always right (bitwise self-correction, Infinity, arXiv 2412.04431): it reads
        `teacher_forcing_input(seen)` and predicts `targets`. Draws come from torch's
        global generator of f's device.

        Args:
            f: features (B, D, H, W).
            share: probability, in [0, 1], that a code is replaced by one drawn uniformly from
                all V, the same one included. At 0 both lists are those of `encode`.

        Raises:
            ValueError: a share outside its range.
        """
        check_value("quantizer: share", share, Share)
        with torch.autocast(f.device.type, enabled=False):
            steps = list(self._residual_steps(f.float(), share))
        return Corrupted([step.nearest for step in steps], [step.used for step in steps])

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
            return self.resize.down(f_hat, k).flatten(2).transpose(1, 2)

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

    def codebook(self, k: int) -> BaseCodebook:
        return self.codebooks[k if len(self.codebooks) > 1 else 0]

    def phi(self, h: Tensor, k: int) -> Tensor:
        conv = self.phis[self.phi_of_scale[k]]
        return (1 - self.phi_ratio) * h + self.phi_ratio * conv(h)

    def _residual_steps(self, f: Tensor, corrupt: float = 0.0) -> Iterator[Step]:
        """Scale by scale, with a share of the codes replaced; z has the gradient of f alone."""
        residual = f
        for k in range(self.schedule.num_scales):
            z = self.resize.down(residual, k)  # (B, D, h_k, w_k)
            nearest = used = self.nearest(z, k)
            if corrupt > 0:
                replaced = torch.rand(nearest.shape, device=f.device) < corrupt
                used = torch.where(replaced, torch.randint_like(nearest, self.vocab_size), nearest)
            part = self.upsample_codes(used, k)  # (B, D, H, W)
            residual = residual - part.detach()
            yield Step(nearest, used, z, part)

    def _scales_to_keep(self) -> int:
        num_scales, first = self.schedule.num_scales, self.quantizer_dropout_from
        may_drop = self.training and self.quantizer_dropout > 0 and first < num_scales
        if may_drop and torch.rand(()) < self.quantizer_dropout:
            return int(torch.randint(first, num_scales, ()))
        return num_scales

    def _start(self, f: Tensor) -> None:
        """Start each codebook from the vectors that its own scales see."""
        zs = []
        residual = f
        for k in range(self.schedule.num_scales):
            z = self.resize.down(residual, k)
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


def _vectors(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
