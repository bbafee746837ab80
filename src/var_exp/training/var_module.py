"""Stage two: the next-scale transformer on the codes of a frozen tokenizer.

VAR (arXiv 2404.02905, section 3.1): teacher forcing over all scales at once, mean cross-entropy
over all tokens. Labels become "no class" now and then in training, for guidance; never in
validation.

    B batch, K scales, L tokens, V codes, D code dimension
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_exp.configurable import Fraction, Share, Weight, checked
from var_exp.data import Batch, CodeBatch
from var_exp.distributed.collectives import broadcast, scatter, world_size
from var_exp.evaluation.evaluator import Evaluator
from var_exp.ops.attention import AUTO, check_backend, resolve_backend
from var_exp.sampling.generate import check_fit
from var_exp.tokenizer import VQVAE
from var_exp.training.module import MakeOptimizer, StageModule, as_list
from var_exp.training.progressive import ProgressiveScales, ScalesInTraining
from var_exp.training.scaling_law import against_law
from var_exp.transformer import VAR
from var_exp.transformer.var import ExecutionOptions, call_block


class Tokens(NamedTuple):
    """inputs: teacher-forcing inputs (B, L - n_1, D); targets: codes (B, L)."""

    inputs: Tensor
    targets: Tensor


class VARModule(StageModule[VAR]):
    """Train a `VAR` on images, seen through a frozen `VQVAE`, or on their codes.

    Args:
        transformer, tokenizer: the networks; the checkpoint holds both.
        class_dropout_prob: probability of training a sample without its class.
        label_smoothing: share of the target that is spread over all codes, in [0, 1]
            (Szegedy et al., arXiv 1512.00567, section 7).
        scale_weights: weight of a token's loss at each scale, K numbers, of which only the
            ratios matter; None weighs all tokens alike, as the paper does. (The code of
            Infinity, arXiv 2412.04431, weighs scales by a power of their size.)
        self_correction_prob: share of the codes that are replaced at random in what the
            transformer reads; the codes of later scales are chosen again, so that it learns to
            correct mistakes like its own (bitwise self-correction, arXiv 2412.04431, section 3.3).
            Needs images.
        progressive: trains the first scales first; None trains all of them from the start.
        scaling_law: log the loss against the paper's scaling law, which holds for the
            published tokenizer on ImageNet.
        attention: how training attends, see `var_exp.ops.attention`.
        recompute: see `activation_checkpointing` of `var_exp.transformer.var.ExecutionOptions`.
        compile: compile the blocks, for which the first batch takes much longer.
        others: see `StageModule`.

    Raises:
        ValueError: networks that do not fit each other, an argument out of its range.
    """

    stage = "var"
    network_name = "transformer"
    monitor = ("val/loss", "min")

    @checked
    def __init__(
        self,
        transformer: VAR,
        tokenizer: VQVAE,
        optimizer: MakeOptimizer,
        schedule: Callable[[float], float],
        class_dropout_prob: Fraction = 0.1,
        label_smoothing: Share = 0.0,
        scale_weights: Sequence[Weight] | None = None,
        self_correction_prob: Share = 0.0,
        progressive: ProgressiveScales | None = None,
        scaling_law: bool = False,
        attention: str = AUTO,
        activation_checkpointing: Share = 0.0,
        compile: bool = False,
        **others: Any,
    ):
        super().__init__(optimizer, schedule, **others)
        check_fit(transformer, tokenizer)
        check_backend(attention)
        self.transformer, self.tokenizer = transformer, tokenizer
        self.transformer.execution = ExecutionOptions(
            attention,
            activation_checkpointing,
            torch.compile(call_block, dynamic=False) if compile else call_block,
        )
        self.class_dropout_prob, self.label_smoothing = class_dropout_prob, label_smoothing
        self.self_correction_prob = self_correction_prob
        self.progressive, self.scaling_law = progressive, scaling_law
        self.scale_weights = check_scale_weights(scale_weights, transformer.schedule.num_scales)
        if progressive and self.scale_weights[: progressive.first].sum() == 0:
            raise ValueError(
                f"model.var: scale_weights {list(scale_weights or ())} leave nothing to train "
                f"while the first {progressive.first} scales are alone (model.var.scale_weights)"
            )
        self.keep_ema()

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

    def on_fit_start(self) -> None:
        super().on_fit_start()
        options = self.transformer.execution
        backend = resolve_backend(options.attention, self.transformer.schedule.seq_len)
        compiled = ", compiled at the first batch" if options.call is not call_block else ""
        if compiled or backend != "mask":  # nothing to tell of the plain way
            self.print(f"{self.stage}: attention by {backend}{compiled}")

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        return evaluator.conclude_var(self.evaluated, self.tokenizer, folder)

    def protocol(self, evaluator: Evaluator) -> dict[str, Any]:
        return evaluator.protocol_of_samples(self.tokenizer, self.eval_weights)

    def check_length(self, num_batches: int) -> None:
        if self.progressive:
            self.progressive.check(self.transformer.schedule.num_scales, num_batches)

    # -- training -------------------------------------------------------------------------

    def on_progress(self, batch: int, num_batches: int) -> None:
        super().on_progress(batch, num_batches)
        self.scales = ScalesInTraining(self.transformer.schedule.num_scales, 1.0)
        if self.progressive:
            self.scales = self.progressive(batch / num_batches, self.scales.num_scales)
            self.figures["train/num_scales"] = self.scales.num_scales

    @property
    def workload(self) -> str:
        return f"{self.scales.num_scales} scales"

    def training_step(self, batch: Batch | CodeBatch, batch_idx: int) -> Tensor:
        (optimizer,) = as_list(self.optimizers())
        parts = self.split(shown_by(batch), self.drop_labels(batch.labels))
        total = batch.labels.new_zeros(())  # of the losses' dtype after the first
        for i, (shown, labels) in enumerate(parts):
            with self.toggled(optimizer, last=i + 1 == len(parts)):
                loss = self.loss(shown, labels) * (len(shown) / len(batch.labels))
                self.manual_backward(loss)
            total = total + loss.detach()
        stepped = self.step(optimizer)
        if stepped:
            self.update_ema()
        terms = self.over_ranks({"loss": total})
        self.log_step(stepped, terms, batch)
        return terms["loss"]

    def loss(self, shown: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean cross-entropy of the scales in training, on images or codes."""
        tokens = self.read(shown, self.self_correction_prob)
        n_first = self.transformer.schedule.num_tokens[0]
        length = self.transformer.schedule.slices[self.scales.num_scales - 1].stop
        logits = self.transformer(tokens.inputs[:, : length - n_first], labels)
        losses = token_losses(logits, tokens.targets[:, :length], self.label_smoothing)
        weights = self.token_weights(losses.device)  # (length,)
        return (losses * weights).mean(dim=0).sum() / weights.sum()

    def token_weights(self, device: torch.device) -> Tensor:
        """Weights of the tokens in training."""
        weights = self.scale_weights.clone()
        newest = self.scales.num_scales - 1
        weights[newest] *= self.scales.weight
        levels = self.transformer.schedule.level_ids()
        return weights[levels[levels <= newest]].to(device)

    def drop_labels(self, labels: Tensor) -> Tensor:
        """Labels (B,) of which some are "no class": the same ones, however many processes."""
        draws = torch.rand(len(labels) * world_size(), device=labels.device)
        dropped = scatter(broadcast(draws)) < self.class_dropout_prob
        return labels.masked_fill(dropped, self.transformer.num_classes)

    @torch.no_grad()
    def read(self, shown: Tensor, corrupt: float = 0.0) -> Tokens:
        """What the transformer reads of images (B, C, H, W) or codes (B, L), and should say."""
        quantizer = self.tokenizer.quantizer
        # In full precision, as the published training does: another rounding is another code.
        with torch.autocast(shown.device.type, enabled=False):
            if corrupt > 0:
                features = self.tokenizer.features(shown)
                targets, seen = quantizer.encode_corrupted(features, corrupt)
            elif shown.is_floating_point():
                seen = targets = self.tokenizer.encode(shown)
            else:
                seen = targets = quantizer.schedule.split(shown)
            return Tokens(quantizer.teacher_forcing_input(seen), torch.cat(targets, dim=1))

    # -- validation -----------------------------------------------------------------------

    def validation_step(self, batch: Batch | CodeBatch, batch_idx: int) -> None:
        tokens = self.read(shown_by(batch))
        logits = self.evaluated(tokens.inputs, batch.labels)
        losses = token_losses(logits, tokens.targets)  # (B, L)
        hits = (logits.argmax(dim=-1) == tokens.targets).float()  # (B, L)
        values = {"val/loss": losses.mean(), "val/acc": hits.mean()}
        schedule = self.transformer.schedule
        for name, where in zip(schedule.names, schedule.slices, strict=True):
            values[f"val/loss_scale_{name}"] = losses[:, where].mean()
            values[f"val/acc_scale_{name}"] = hits[:, where].mean()
        values["val/loss_last_scale"] = losses[:, schedule.slices[-1]].mean()
        values["val/acc_last_scale"] = hits[:, schedule.slices[-1]].mean()
        if self.scaling_law:
            num_parameters = sum(p.numel() for p in self.transformer.parameters())
            law = against_law(values["val/loss"], values["val/loss_last_scale"], num_parameters)
            values |= {f"val/{name}": value for name, value in law.items()}
        self.log_dict(values, batch_size=len(tokens.targets), sync_dist=True)


def shown_by(batch: Batch | CodeBatch) -> Tensor:
    """The images (B, C, H, W) or the codes (B, L) of a batch."""
    return batch.codes if isinstance(batch, CodeBatch) else batch.images


def token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token in nats: logits (B, L, V), targets (B, L) -> (B, L)."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return losses.view_as(targets)


def check_scale_weights(weights: Sequence[float] | None, num_scales: int) -> Tensor:
    """Weights (K,), all 1 for None.

    Raises:
        ValueError: not one for each scale, a negative one, or none above 0.
    """
    if weights is None:
        return torch.ones(num_scales)
    values = torch.tensor([float(weight) for weight in weights])
    if len(values) != num_scales or values.min() < 0 or values.max() <= 0:
        raise ValueError(
            f"model.var: scale_weights must be {num_scales} numbers >= 0, not all 0, one for each "
            f"scale, got {list(weights)} (model.var.scale_weights)"
        )
    return values
