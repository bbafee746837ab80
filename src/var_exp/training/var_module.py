"""Stage two: the next-scale transformer on the codes of a frozen tokenizer.

VAR (arXiv 2404.02905, section 3.1): teacher forcing over all scales at once, mean cross-entropy
over all tokens. Labels become "no class" now and then in training, for guidance; never in
validation.

    B batch, L tokens, V codes
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from var_exp.evaluation.evaluator import Evaluator
from var_exp.sampling import check_fit
from var_exp.tokenizer import VQVAE
from var_exp.training.stage import StageModule
from var_exp.transformer import VAR


class VARModule(StageModule):
    """Train a `VAR` on images, seen through a frozen `VQVAE`.

    Args:
        transformer, tokenizer: the networks; the checkpoint holds both.
        label_drop: probability of training a sample without its class.
        others: see `StageModule`.

    Raises:
        ValueError: networks that do not fit each other.
    """

    stage = "var"
    network_name = "transformer"
    monitor = ("val/loss", "min")

    def __init__(
        self,
        transformer: VAR,
        tokenizer: VQVAE,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[float], float],
        weight_decay: float = 0.05,
        clip: float = 2.0,
        average_decay: float = 0.0,
        label_drop: float = 0.1,
    ):
        super().__init__(optimizer, schedule, weight_decay, clip, average_decay)
        check_fit(transformer, tokenizer)
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.label_drop = label_drop
        self.keep_average()

    def networks(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.check_equal(checkpoint, "tokenizer_fingerprint")  # known once stage one is over

    def setup(self, stage: str) -> None:
        # Not earlier: stage one may still have to train it.
        self.tokenizer.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "VARModule":
        super().train(mode)
        self.tokenizer.eval()
        return self

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        return evaluator.conclude_var(self.transformer, self.tokenizer, folder)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        inputs, targets = self.read(batch.images)
        labels = self.drop_labels(batch.labels)
        loss = token_losses(self.transformer(inputs, labels), targets).mean()
        self.log("train/loss", loss.detach())
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        inputs, targets = self.read(batch.images)
        logits = self.evaluated(inputs, batch.labels)
        losses = token_losses(logits, targets)  # (B, L)
        hits = (logits.argmax(dim=-1) == targets).float()  # (B, L)
        values = {"val/loss": losses.mean(), "val/acc": hits.mean()}
        schedule = self.transformer.schedule
        for name, where in zip(schedule.names, schedule.slices, strict=True):
            values[f"val/loss_scale_{name}"] = losses[:, where].mean()
            values[f"val/acc_scale_{name}"] = hits[:, where].mean()
        self.log_dict(values, batch_size=len(targets), sync_dist=True)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> teacher-forcing inputs (B, L - n_1, D) and target codes (B, L)."""
        with torch.no_grad():
            indices = self.tokenizer.encode(images)
            return self.tokenizer.quantizer.teacher_forcing_input(indices), torch.cat(indices, 1)

    def drop_labels(self, labels: Tensor) -> Tensor:
        dropped = torch.rand(labels.shape, device=labels.device) < self.label_drop
        return labels.masked_fill(dropped, self.transformer.num_classes)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm=None
    ) -> None:
        self.clip_and_log(optimizer)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end, which runs after the checkpoint callbacks have saved.
        self.update_average()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in nats: logits (B, L, V), targets (B, L) -> (B, L)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
