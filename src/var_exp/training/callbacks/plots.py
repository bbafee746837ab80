"""Plots of validation metrics, and the report, refreshed while a stage trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from var_exp.report import write_report
from var_exp.training.callbacks.evaluation import log_figures, step
from var_exp.training.loggers.guarded import ReportOnce, log_picture
from var_exp.training.module import StageModule, stage_of
from var_exp.visualization.images import save_png
from var_exp.visualization.panels import Band
from var_exp.visualization.plots import curves, heat_maps


class History(Callback):
    """Base: remembers the metrics of validations, and draws them after each."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.attempt = ReportOnce("plots of metrics", "they may be missing in the run folder")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        batch = step(trainer) + 1
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                points = self.history.setdefault(name, [])
                # One of this batch is of a validation that was cut off and is made up for.
                points[:] = [point for point in points if point[0] != batch]
                points.append((batch, value.item()))
        self.draw(trainer, stage_of(module))

    def draw(self, trainer: L.Trainer, module: StageModule) -> None:
        raise NotImplementedError

    def show(self, trainer: L.Trainer, name: str, picture: np.ndarray) -> None:
        """Give a picture to the loggers and, as `<name>.png`, to the stage's folder."""
        log_picture(trainer, f"val/{name}", picture, step(trainer))
        path = Path(trainer.default_root_dir) / f"{name}.png"
        self.attempt(lambda: save_png(picture, path))


class Curves(History):
    """`curves.png`: validation metrics so far, with the bands in which they are expected to end.

    Args:
        expected: `stage/metric` -> (low, high), of both stages; also logged, for dashboards.
    """

    def __init__(self, expected: Mapping[str, Band] | None = None):
        super().__init__()
        self.expected = expected or {}

    def draw(self, trainer: L.Trainer, module: StageModule) -> None:
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
            self.show(trainer, "curves", curves(self.history, bands))


class CodebookMap(History):
    """`codebook.png`: usage and perplexity of the codes, scale by scale, over the validations."""

    def draw(self, trainer: L.Trainer, module: StageModule) -> None:
        if trainer.is_global_zero:
            self.show(trainer, "codebook", heat_maps(self.history))


class Report(Callback):
    """Refresh the run folder's `report.html` after each validation."""

    def __init__(self) -> None:
        self.attempt = ReportOnce("report.html", "the page may not be of the last validation")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the page reads what they wrote
            self.attempt(lambda: write_report(Path(trainer.default_root_dir).parent))
