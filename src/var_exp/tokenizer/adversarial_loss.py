"""The adversary of the tokenizer: a discriminator, and the mathematics of the game.

The tokenizer's decoder learns to make reconstructions that a discriminator takes for images
(VQGAN, Esser et al., arXiv 2012.09841, section 3.1). Three things are decided here: the losses of
both sides; how much the decoder listens, now and over the run; and what is remembered from batch
to batch.

A batch may be split into micro-batches and over processes, and the result must not depend on it.
So nothing is remembered while a batch lasts: `measure` and `discriminator_loss` only collect, and
`finish_batch` brings together what all micro-batches and processes collected. What is measured on
one batch therefore takes effect on the next.

    B batch, N places that a discriminator judges, images (B, C, H, W) in [-1, 1]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.configurable import Weight, checked
from var_exp.distributed.collectives import all_reduce_sum, world_size

KEY = "adversary"
EPS = 1e-6  # of equation 7 of VQGAN, with delta in its place
LECAM_DECAY = 0.99


class GANLoss(NamedTuple):
    """discriminator(real logits, fake logits) and generator(fake logits), each a scalar."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Geometric GAN (Lim and Ye, arXiv 1705.02894), the mean of both sides as in VQGAN."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    return -fake.mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Goodfellow et al., arXiv 1406.2661, the mean of both sides."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def non_saturating_generator(fake: Tensor) -> Tensor:
    return F.softplus(-fake).mean()


LOSSES = {
    "hinge": GANLoss(hinge_discriminator, hinge_generator),
    "non_saturating": GANLoss(non_saturating_discriminator, non_saturating_generator),
}


class AdversarialLoss(nn.Module):
    """A discriminator with its losses, and how much the generator listens to it.

    Args:
        discriminator: images (B, C, H, W) in [-1, 1] -> logits (B, N).
        weight: of the adversarial term in the generator's loss.
        adaptive: multiply it with the ratio of the gradients that the other terms and the
            adversarial one have at the decoder's last layer.
        max_weight: that ratio is at most this.
        start: when the adversary sets in. A float is a share of the run in [0, 1], an int a
            number of batches: 1.0 is never, 1 after the first batch.
        ramp: how long its weight takes to rise to the full one, in the same units.
        lecam: weight of the LeCam regularisation of the discriminator.
        loss: "hinge" or "non_saturating".

    Buffers, kept in checkpoints:
        adaptive_weight: scalar, the ratio measured on the last batch. It starts at 0, so the
            generator does not listen in the first adversarial batch, which only measures.
        logit_averages: (2,), moving averages of the logits of images and of reconstructions,
            from 0; they move only where `lecam` is above 0.

    Raises:
        ValueError: an argument out of its range.
    """

    adaptive_weight: Tensor
    logit_averages: Tensor
    _gradients: Tensor | None
    _logits: Tensor | None

    @checked
    def __init__(
        self,
        discriminator: nn.Module,
        weight: Weight = 0.5,
        adaptive: bool = True,
        max_weight: Weight = 1e4,
        start: float | int = 0.2,
        ramp: float | int = 0.02,
        lecam: Weight = 0.0,
        loss: str = "hinge",
    ):
        super().__init__()
        for name, value in {"start": start, "ramp": ramp}.items():
            share = type(value) is float and 0 <= value <= 1
            batches = type(value) is int and value >= 0  # and so no bool
            _check(name, value, share or batches, "a share from 0.0 to 1.0 or a number of batches")
        _check("loss", loss, loss in LOSSES, f"one of {', '.join(LOSSES)}")
        self.discriminator, self.loss = discriminator, LOSSES[loss]
        self.weight, self.adaptive, self.max_weight = weight, adaptive, max_weight
        self.start, self.ramp, self.lecam = start, ramp, lecam
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self.register_buffer("logit_averages", torch.zeros(2))
        self._clear()

    # -- losses ---------------------------------------------------------------------------

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """What the discriminator minimises, on images and reconstructions (B, C, H, W).

        Returns:
            Named scalars in float32: `loss`; `real` and `fake`, the mean logits; `lecam`, the
            unweighted regularisation, where it is on. No gradient reaches `fake`.
        """
        logits = self.discriminator(torch.cat([real, fake.detach()])).float()  # (2B, N)
        real_logits, fake_logits = logits.split([len(real), len(fake)])
        terms = {
            "loss": self.loss.discriminator(real_logits, fake_logits),
            "real": real_logits.detach().mean(),
            "fake": fake_logits.detach().mean(),
        }
        if self.lecam > 0:
            terms["lecam"] = lecam_distance(real_logits, fake_logits, self.logit_averages)
            terms["loss"] = terms["loss"] + self.lecam * terms["lecam"]
            self._collect_logits(real_logits.detach(), fake_logits.detach())
        return terms

    def generator_loss(self, fake: Tensor) -> Tensor:
        """The unweighted adversarial term of reconstructions (B, C, H, W): a float32 scalar."""
        return self.loss.generator(self.discriminator(fake).float())

    # -- how much the generator listens ---------------------------------------------------

    def factor(self, batch: int, num_batches: int) -> float:
        """0 up to the start, then along a line to 1 at the end of the ramp.

        Args:
            batch: number of the batch, from 0.
            num_batches: of the whole run.
        """
        start, ramp = (
            value if isinstance(value, int) else round(value * num_batches)
            for value in (self.start, self.ramp)
        )
        if ramp == 0:
            return float(batch >= start)
        return min(max((batch - start) / ramp, 0.0), 1.0)

    def generator_weight(self, factor: float) -> Tensor:
        """Weight of the adversarial term in the generator's loss at a factor: a scalar."""
        ratio = self.adaptive_weight if self.adaptive else torch.ones_like(self.adaptive_weight)
        return self.weight * factor * ratio

    def measure(self, rec_loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> None:
        """Collect the gradients whose norms give the adaptive weight; graphs stay for backward.

        Args:
            rec_loss, gan_loss: the other terms and the unweighted adversarial one of a
                micro-batch, times the micro-batch's share of the batch.
            last_layer: the weight of the decoder's last convolution.
        """
        gradients = [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].flatten()
            for loss in (rec_loss, gan_loss)
        ]
        collected = torch.stack(gradients)  # (2, numel)
        self._gradients = collected if self._gradients is None else self._gradients + collected

    def _collect_logits(self, real: Tensor, fake: Tensor) -> None:
        sums = [torch.stack([x.sum(), x.new_tensor(x.numel())]) for x in (real, fake)]
        collected = torch.stack(sums)  # (2, 2): sum and number, of images and reconstructions
        self._logits = collected if self._logits is None else self._logits + collected

    def finish_batch(self) -> None:
        """Remember what was collected over a batch; all processes call it alike.

        The adaptive weight is that of VQGAN, equation 7: the norm of the gradient of the other
        terms over that of the adversarial term, both of the whole batch. Where a gradient or a
        logit is not finite, what was remembered before is kept.
        """
        if self._gradients is not None:
            rec, gan = (all_reduce_sum(self._gradients) / world_size()).norm(dim=1)
            ratio = (rec / (gan + EPS)).clamp(max=self.max_weight)
            _remember(self.adaptive_weight, ratio, (rec + gan).isfinite())
        if self._logits is not None:
            total, count = (all_reduce_sum(self._logits) / world_size()).unbind(1)
            means = self.logit_averages.lerp(total / count, 1 - LECAM_DECAY)
            _remember(self.logit_averages, means, means.isfinite().all())
        self._clear()

    def _clear(self) -> None:
        self._gradients = self._logits = None


def lecam_distance(real: Tensor, fake: Tensor, averages: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al., arXiv 2104.03310, section 3).

    The squared distance of the logits of images from the average of reconstructions, plus that
    the other way round: what keeps a discriminator from drawing the two apart without end.
    """
    average_real, average_fake = averages.unbind()
    return (real - average_fake).square().mean() + (fake - average_real).square().mean()


def _remember(buffer: Tensor, value: Tensor, usable: Tensor) -> None:
    """Without asking the device whether the value is usable, which would wait for it."""
    buffer.copy_(torch.where(usable, value, buffer))


def _check(name: str, value: object, allowed: bool, expected: str) -> None:
    if not allowed:
        raise ValueError(f"adversary: {name} must be {expected}, got {value!r} ({KEY}.{name})")
