"""Looking at the model while it trains: pictures and scores at each validation."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from pydantic import PositiveInt

from var_exp.configurable import VocabSize, checked
from var_exp.evaluation.evaluator import Evaluator
from var_exp.tokenizer import VQVAE
from var_exp.training.callbacks.checkpointing import checkpoints_of
from var_exp.training.loggers.guarded import log_picture, log_scalars
from var_exp.training.module import StageModule, data_of, stage_of
from var_exp.training.tokenizer_module import TokenizerModule
from var_exp.training.var_module import VARModule
from var_exp.transformer import VAR


class EvaluationCallback(Callback):
    """Base: calls `evaluate` after each validation, or every n batches or epochs of training.

    On all processes, since scores are shared work; pictures are of the first. One that an
    interruption cut off, or left no time for, is made up for when the stage goes on.

    Args:
        evaluator: of the run.
        every_n_batches, every_n_epochs: at most one of them; None for both: at each validation.

    Raises:
        ValueError: both, or one below 1.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        every_n_batches: int | None = None,
        every_n_epochs: int | None = None,
    ):
        check_interval(every_n_batches, every_n_epochs)
        self.evaluator = evaluator
        self.every_n_batches, self.every_n_epochs = every_n_batches, every_n_epochs
        self.evaluated_at = 0  # batches done then

    @property
    def state_key(self) -> str:
        every = {"every_n_batches": self.every_n_batches, "every_n_epochs": self.every_n_epochs}
        return self._generate_state_key(**every)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_at": self.evaluated_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated_at = state["evaluated_at"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.evaluate_at_interval(trainer, stage_of(module))  # one that was left over

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        checkpoints_of(trainer).note_due(trainer)
        self.evaluate_at_interval(trainer, stage_of(module))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and self.interval(trainer) is None:
            self.evaluate_once(trainer, stage_of(module))

    def evaluate_at_interval(self, trainer: L.Trainer, module: StageModule) -> None:
        interval = self.interval(trainer)
        if interval is not None and (step(trainer) + 1) % interval == 0:
            self.evaluate_once(trainer, module)

    def evaluate_once(self, trainer: L.Trainer, module: StageModule) -> None:
        """Evaluate, unless it was done before an interruption; end where one is asked for."""
        if self.evaluated_at == step(trainer) + 1:
            return

        def stop_if_requested() -> None:
            checkpoints_of(trainer).stop_if_requested(trainer)

        stop_if_requested()  # pictures do not look at signals
        self.evaluator.on_batch = stop_if_requested
        with module.whole():
            self.evaluate(trainer, module)
        self.evaluator.on_batch = lambda: None
        self.evaluated_at = step(trainer) + 1

    def interval(self, trainer: L.Trainer) -> int | None:
        """In batches."""
        if self.every_n_epochs is None:
            return self.every_n_batches
        data = data_of(trainer)
        return self.every_n_epochs * math.ceil(len(data.source.train) / data.batch_size)

    def evaluate(self, trainer: L.Trainer, module: Any) -> None:
        """With the module of the stage that a subclass is for."""
        raise NotImplementedError


def check_interval(
    every_n_batches: int | None, every_n_epochs: int | None, key: str = "evaluation"
) -> None:
    """Raise ValueError unless at most one is given, and that one is at least 1."""
    given = [n for n in (every_n_batches, every_n_epochs) if n is not None]
    if len(given) > 1 or any(type(n) is not int or n < 1 for n in given):
        raise ValueError(
            f"{key}: expected every_n_batches or every_n_epochs, at least 1, or null for both, got "
            f"{every_n_batches} and {every_n_epochs} ({key}.every_n_batches, {key}.every_n_epochs)"
        )


def log_figures(trainer: L.Trainer, figures: Mapping[str, float]) -> None:
    named = {f"val/{name}": value for name, value in figures.items()}
    log_scalars(trainer, named, step(trainer))


def step(trainer: L.Trainer) -> int:
    """The number of the last batch, under which Lightning logs a validation too.

    Not `global_step`, which counts the steps of two optimizers.
    """
    return stage_of(trainer.lightning_module).batch


class ReconstructionPictures(EvaluationCallback):
    """Fixed validation images beside their reconstruction after each scale."""

    @checked
    def __init__(self, evaluator: Evaluator, num_images: PositiveInt = 12, **interval: int | None):
        super().__init__(evaluator, **interval)
        self.num_images = num_images

    def evaluate(self, trainer: L.Trainer, module: TokenizerModule) -> None:
        if trainer.is_global_zero:
            picture = self.evaluator.reconstruction_picture(module.evaluated, self.num_images)
            log_picture(trainer, "val/reconstructions", picture, step(trainer))


class SamplePictures(EvaluationCallback):
    """A grid of samples by class, and the strip of what each scale adds."""

    @checked
    def __init__(
        self, evaluator: Evaluator, num_per_class: PositiveInt = 4, **interval: int | None
    ):
        super().__init__(evaluator, **interval)
        self.num_per_class = num_per_class

    def evaluate(self, trainer: L.Trainer, module: VARModule) -> None:
        if trainer.is_global_zero:
            drawn = self.evaluator.draw_per_class(
                module.evaluated, module.tokenizer, self.num_per_class
            )
            log_picture(trainer, "val/samples", drawn.grid, step(trainer))
            log_picture(trainer, "val/coarse_to_fine", drawn.strip, step(trainer))


class Scores(EvaluationCallback):
    """Base: scores of the weights that are handed on, and of the others under a suffix.

    Args:
        num_images: to measure on.
        both_weights: score raw and averaged weights where both are there, else the first alone.
        interval: every_n_batches, every_n_epochs.
    """

    @checked
    def __init__(
        self,
        evaluator: Evaluator,
        num_images: VocabSize | None,
        both_weights: bool = True,
        **interval: int | None,
    ):
        super().__init__(evaluator, **interval)
        self.num_images, self.both_weights = num_images, both_weights

    def evaluate(self, trainer: L.Trainer, module: StageModule) -> None:
        figures: dict[
            str, float
        ] = {}  # of both, or an interruption between them would log the first ones twice
        for suffix, network in module.weight_variants.items():
            if suffix == "" or self.both_weights:
                found = self.score(network, module)
                figures |= {f"{name}{suffix}": value for name, value in found.items()}
        log_figures(trainer, figures)

    def score(self, network: Any, module: Any) -> dict[str, float]:
        raise NotImplementedError


class SampleScores(Scores):
    """FID, Inception Score, KID, precision, recall and class accuracy of fresh samples."""

    num_images: int

    def score(self, network: VAR, module: VARModule) -> dict[str, float]:
        return self.evaluator.score_samples(network, module.tokenizer, self.num_images)


class ReconstructionScores(Scores):
    """The same of reconstructions, against the very images they are made of."""

    def score(self, network: VQVAE, module: TokenizerModule) -> dict[str, float]:
        return self.evaluator.score_reconstructions(network, self.num_images)
