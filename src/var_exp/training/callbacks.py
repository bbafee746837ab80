"""Looking at the model while it trains: pictures and scores at each validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from var_exp.evaluation.curves import Band, curves
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.pictures import save_png
from var_exp.training.loggers import log_picture
from var_exp.training.tokenizer_module import TokenizerModule
from var_exp.training.var_module import VARModule


class EvaluationCallback(Callback):
    """Base: calls `evaluate` after each validation within training.

    On all processes, since scores are shared work; pictures are of the first.
    """

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.evaluate(trainer, module)

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        raise NotImplementedError

    def show(self, trainer: L.Trainer, name: str, picture) -> None:
        """To every logger, and as a file named by its batch in the stage's folder."""
        log_picture(trainer, f"val/{name}", picture, step(trainer))
        folder = Path(trainer.default_root_dir) / "pictures"
        save_png(picture, folder / f"{name}_{step(trainer) + 1:06d}.png")


def log_figures(trainer: L.Trainer, figures: Mapping[str, float]) -> None:
    for logger in trainer.loggers:
        named = {f"val/{name}": value for name, value in figures.items()}
        logger.log_metrics(named, step(trainer))


def step(trainer: L.Trainer) -> int:
    """The number of the last batch, under which Lightning logs a validation too.

    Not `global_step`, which counts the steps of two optimizers.
    """
    return trainer.lightning_module.batch


class ReconstructionPictures(EvaluationCallback):
    """Fixed validation images beside their reconstruction after each scale."""

    def __init__(self, evaluator: Evaluator, num_images: int = 12):
        self.evaluator, self.num_images = evaluator, num_images

    def evaluate(self, trainer: L.Trainer, module: TokenizerModule) -> None:
        if trainer.is_global_zero:
            picture = self.evaluator.reconstruction_picture(module.evaluated, self.num_images)
            self.show(trainer, "reconstructions", picture)


class SamplePictures(EvaluationCallback):
    """A grid of samples by class, and the strip of what each scale adds."""

    def __init__(self, evaluator: Evaluator, num_per_class: int = 4):
        self.evaluator, self.num_per_class = evaluator, num_per_class

    def evaluate(self, trainer: L.Trainer, module: VARModule) -> None:
        if trainer.is_global_zero:
            drawn = self.evaluator.draw_per_class(
                module.evaluated, module.tokenizer, self.num_per_class
            )
            self.show(trainer, "samples", drawn.grid)
            self.show(trainer, "coarse_to_fine", drawn.strip)


class SampleScores(EvaluationCallback):
    """FID, Inception Score and class accuracy of fresh samples."""

    def __init__(self, evaluator: Evaluator, num_samples: int = 200):
        self.evaluator, self.num_samples = evaluator, num_samples

    def evaluate(self, trainer: L.Trainer, module: VARModule) -> None:
        scores = self.evaluator.score_samples(module.evaluated, module.tokenizer, self.num_samples)
        log_figures(trainer, scores)


class ReconstructionScores(EvaluationCallback):
    """Reconstruction FID, and what the judge finds right of reconstructions."""

    def __init__(self, evaluator: Evaluator, num_images: int = 1000):
        self.evaluator, self.num_images = evaluator, num_images

    def evaluate(self, trainer: L.Trainer, module: TokenizerModule) -> None:
        scores = self.evaluator.score_reconstructions(module.evaluated, self.num_images)
        log_figures(trainer, scores)


class Curves(EvaluationCallback):
    """`curves.png`: the validations so far, with the band where a figure is expected to end.

    Args:
        panels: see `var_exp.evaluation.curves`.
        expected: `stage/metric` -> (low, high), of both stages; also logged, for dashboards.
    """

    def __init__(
        self, panels: Mapping[str, Sequence[str]], expected: Mapping[str, Band] | None = None
    ):
        self.panels, self.expected = panels, expected or {}
        self.history: dict[str, list[tuple[int, float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                self.history.setdefault(name, []).append((step(trainer) + 1, value.item()))
        bands = {
            f"val/{name.removeprefix(f'{module.stage}/')}": band
            for name, band in self.expected.items()
            if name.startswith(f"{module.stage}/")
        }
        ends = {
            f"{name.removeprefix('val/')}_expected_{end}": value
            for name, band in bands.items()
            for end, value in zip(("low", "high"), band, strict=True)
            if name in self.history
        }
        if ends:
            log_figures(trainer, ends)
        if trainer.is_global_zero:
            picture = curves(self.history, self.panels, bands)
            log_picture(trainer, "val/curves", picture, step(trainer))
            save_png(picture, Path(trainer.default_root_dir) / "curves.png")
