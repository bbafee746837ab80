"""Stage one: the multi-scale VQ tokenizer.

VAR (arXiv 2404.02905, section 3.2). Optimisation is manual, because the adversarial losses that
a tokenizer is trained with take two optimizers.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from var_exp.evaluation.evaluator import Evaluator
from var_exp.tokenizer import VQVAE
from var_exp.tokenizer.losses import ReconstructionLoss, psnr
from var_exp.training.stage import StageModule


class TokenizerModule(StageModule):
    """Train a `VQVAE` on the images of batches.

    Args:
        tokenizer: the network.
        loss: of a reconstruction.
        others: see `StageModule`.
    """

    stage = "tokenizer"
    network_name = "tokenizer"
    monitor = ("val/psnr", "max")

    def __init__(
        self,
        tokenizer: VQVAE,
        loss: ReconstructionLoss,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[float], float],
        weight_decay: float = 0.0,
        clip: float = 1.0,
        average_decay: float = 0.0,
    ):
        super().__init__(optimizer, schedule, weight_decay, clip, average_decay)
        self.automatic_optimization = False
        self.tokenizer, self.loss = tokenizer, loss
        self.keep_average()

    def networks(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        return evaluator.conclude_tokenizer(self.tokenizer, folder)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        terms = self.loss(self.tokenizer(batch.images), batch.images)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(terms["loss"])
        self.clip_and_log(optimizer)
        optimizer.step()
        self.update_average()
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"].detach()

    # -- validation -----------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        quantizer = self.tokenizer.quantizer
        shape = (quantizer.schedule.num_scales, quantizer.vocab_size)
        self.code_counts = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def validation_step(self, batch, batch_idx: int) -> None:
        tokenizer = self.evaluated
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
        }
        self.log_dict(values, batch_size=len(batch.images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        counts = self.trainer.strategy.reduce(self.code_counts, reduce_op="sum")
        names = self.tokenizer.schedule.names
        for name, values in zip(names, counts, strict=True):
            self.log(f"val/usage_scale_{name}", usage(values))
            self.log(f"val/perplexity_scale_{name}", perplexity(values))


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
