"""Stage one: the multi-scale VQ tokenizer.

VAR (arXiv 2404.02905, section 3.2). Optimisation is manual, because the adversarial losses that
a tokenizer is trained with take two optimizers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.functional.image import structural_similarity_index_measure

from var_exp.data import Batch
from var_exp.evaluation.evaluator import Evaluator
from var_exp.tokenizer import VQVAE
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.losses import ReconstructionLoss, psnr
from var_exp.training.module import MakeOptimizer, StageModule, as_list
from var_exp.training.optim import param_groups

PARTS = {
    "encoder": ("encoder", "quant_conv"),
    "codebook": ("quantizer",),
    "decoder": ("post_quant_conv", "decoder"),
}


class TokenizerModule(StageModule[VQVAE]):
    """Train a `VQVAE` on the images of batches.

    Args:
        tokenizer: the network.
        loss: of a reconstruction.
        adversary: a discriminator and its losses; None trains without.
        discriminator_optimizer: like `optimizer`, which serves both unless this is given.
        freeze: parts that stay as they are: "encoder", "codebook" (with phi; also its dropout
            and entropy are then off), "decoder".
        others: see `StageModule`.

    Raises:
        ValueError: an unknown part, all of them, or a frozen decoder whose last layer should
            measure the weight of the adversary.
    """

    stage = "tokenizer"
    network_name = "tokenizer"
    monitor = ("val/psnr", "max")
    # Codebooks change in place within the forward pass; of the last layer a gradient is asked for
    # apart from the backward pass, which shards are not there for.
    kept_whole = ("quantizer.codebooks", "decoder.conv_out")

    def __init__(
        self,
        tokenizer: VQVAE,
        loss: ReconstructionLoss,
        optimizer: MakeOptimizer,
        schedule: Callable[[float], float],
        adversary: AdversarialLoss | None = None,
        discriminator_optimizer: MakeOptimizer | None = None,
        freeze: Sequence[str] = (),
        **others: Any,
    ):
        super().__init__(optimizer, schedule, **others)
        self.tokenizer, self.loss, self.adversary = tokenizer, loss, adversary
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        check_size(tokenizer.image_size, adversary, loss)
        self.frozen = check_parts(freeze, adversary)
        for part in self.frozen:
            tokenizer.get_submodule(part).requires_grad_(False)
        self.keep_ema()

    def networks(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def train(self, mode: bool = True) -> "TokenizerModule":
        super().train(mode)
        for part in self.frozen:  # a codebook in training mode would learn without gradients
            self.tokenizer.get_submodule(part).eval()
        return self

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        return evaluator.conclude_tokenizer(self.tokenizer, folder)

    def protocol(self, evaluator: Evaluator) -> dict[str, Any]:
        return evaluator.protocol_of_reconstructions(self.tokenizer, self.eval_weights)

    # -- training -------------------------------------------------------------------------

    def make_optimizers(self) -> list[Optimizer]:
        optimizers = super().make_optimizers()
        if self.adversary:
            groups = param_groups(self.adversary, 0.0)
            optimizers.append(self.make_discriminator_optimizer(groups))
        return optimizers

    def on_progress(self, batch: int, num_batches: int) -> None:
        super().on_progress(batch, num_batches)
        self.factor = self.adversary.factor(batch, num_batches) if self.adversary else 0.0

    @property
    def workload(self) -> str:
        return "with adversary" if self.factor > 0 else "whole"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        parts = [images for (images,) in self.split(batch.images)]
        generator, *others = as_list(self.optimizers())
        reconstructed, terms = self.generator_step(generator, parts)
        stepped = self.step(generator)
        if stepped:
            self.update_ema()
        if self.adversary is not None and self.factor > 0:
            (discriminator,) = others
            terms |= self.discriminator_step(self.adversary, discriminator, parts, reconstructed)
            stepped &= self.step(discriminator, name="discriminator_")
            self.adversary.finish_batch()
        terms = self.over_ranks(terms)
        self.log_step(stepped, terms, batch)
        return terms["loss"]

    def generator_step(
        self, optimizer: LightningOptimizer, parts: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients of the tokenizer; its reconstructions, and the means of all terms."""
        reconstructed: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        total = sum(map(len, parts))
        for i, images in enumerate(parts):
            share = len(images) / total
            with self.toggled(optimizer, last=i + 1 == len(parts)):
                output = self.tokenizer(images)
                terms = self.loss(output, images)
                if self.adversary is not None and self.factor > 0:
                    inputs = output.images, terms["loss"], share
                    terms |= self.adversarial_terms(self.adversary, *inputs)
                self.manual_backward(terms["loss"] * share)
            reconstructed.append(output.images.detach())
            add(sums, terms, share)
        return reconstructed, sums

    def adversarial_terms(
        self, adversary: AdversarialLoss, reconstructed: Tensor, loss: Tensor, share: float
    ) -> dict[str, Tensor]:
        """The adversarial term, and the loss with it."""
        adversarial = adversary.generator_loss(reconstructed)
        if adversary.adaptive:
            last_layer = self.tokenizer.decoder.conv_out.weight
            adversary.measure(loss * share, adversarial * share, last_layer)
        weight = adversary.generator_weight(self.factor)
        return {
            "adversarial": adversarial,
            "adversarial_weight": torch.as_tensor(weight),
            "loss": loss + weight * adversarial,
        }

    def discriminator_step(
        self,
        adversary: AdversarialLoss,
        optimizer: LightningOptimizer,
        parts: list[Tensor],
        reconstructed: list[Tensor],
    ) -> dict[str, Tensor]:
        """Gradients of the discriminator, on reconstructions that the tokenizer's step has made."""
        sums: dict[str, Tensor] = {}
        total = sum(map(len, parts))
        for i, (images, fakes) in enumerate(zip(parts, reconstructed, strict=True)):
            share = len(images) / total
            with self.toggled(optimizer, last=i + 1 == len(parts)):
                terms = adversary.discriminator_loss(images, fakes)
                self.manual_backward(terms["loss"] * share)
            add(sums, {f"discriminator_{name}": value for name, value in terms.items()}, share)
        return sums

    # -- validation -----------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        quantizer = self.tokenizer.quantizer
        shape = (quantizer.schedule.num_scales, quantizer.vocab_size)
        self.code_counts = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def validation_step(self, batch, batch_idx: int) -> None:
        tokenizer = self.evaluated
        with torch.autocast(self.device.type, enabled=False):  # as the codes are read later
            indices = tokenizer.encode(batch.images)
            images = tokenizer.decode(indices)
        for k, codes in enumerate(indices):
            self.code_counts[k] += torch.bincount(
                codes.flatten(), minlength=self.code_counts.shape[1]
            )
        values = {
            "val/l1": (images - batch.images).abs().mean(),
            "val/l2": (images - batch.images).square().mean(),
            "val/psnr": psnr(images, batch.images).mean(),
            "val/ssim": structural_similarity_index_measure(images, batch.images, data_range=2.0),
        }
        if self.loss.perceptual is not None:
            values["val/lpips"] = self.loss.perceptual(images, batch.images).mean()
        self.log_dict(values, batch_size=len(batch.images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        counts = self.trainer.strategy.reduce(self.code_counts, reduce_op="sum")
        names = self.tokenizer.schedule.names
        for name, values in zip(names, counts, strict=True):
            # The counts are those of all processes; the flag only keeps Lightning from a warning.
            self.log(f"val/usage_scale_{name}", usage(values), sync_dist=True)
            self.log(f"val/perplexity_scale_{name}", perplexity(values), sync_dist=True)


def add(sums: dict[str, Tensor], terms: dict[str, Tensor], share: float) -> None:
    """Add a micro-batch's share of the means of a batch."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + value.detach() * share


def check_size(
    size: tuple[int, int], adversary: AdversarialLoss | None, loss: ReconstructionLoss
) -> None:
    """Raise ValueError for images that a network is too deep for, which would show late."""
    discriminator = adversary and adversary.discriminator
    for network, remedy in (
        (discriminator, "lower adversary.discriminator.num_layers, or set adversary=none"),
        (loss.perceptual, "set model.tokenizer.loss.lpips=0 and ...loss.perceptual=null"),
    ):
        smallest = getattr(network, "smallest_side", 1)
        if min(size) < smallest:
            raise ValueError(
                f"model.tokenizer: {type(network).__name__} takes images of at least {smallest} "
                f"pixels a side, got {size}; {remedy}"
            )


def check_parts(freeze: Sequence[str], adversary: AdversarialLoss | None) -> list[str]:
    """The submodules of a tokenizer that are frozen, by the names of its parts."""
    unknown = set(freeze) - set(PARTS)
    if unknown or len(set(freeze)) == len(PARTS):
        raise ValueError(
            f"model.tokenizer: freeze takes some of {', '.join(PARTS)}, but not all, got "
            f"{list(freeze)} (model.tokenizer.freeze)"
        )
    if "decoder" in freeze and adversary is not None:
        raise ValueError(
            "model.tokenizer: a frozen decoder has nothing to learn from an adversary; unfreeze "
            "it (model.tokenizer.freeze), or set adversary=none"
        )
    return [part for name in freeze for part in PARTS[name]]


def usage(counts: Tensor) -> Tensor:
    """Share of the codes in use, of those that could have been: counts (V,) -> scalar in [0, 1].

    A scale that showed fewer tokens than there are codes could use only so many.
    """
    possible = counts.sum().clamp(max=len(counts))
    return (counts > 0).sum() / possible.clamp(min=1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code distribution: counts (V,) -> scalar in [1, V]."""
    p = counts / counts.sum().clamp(min=1)
    return torch.special.entr(p).sum().exp()
