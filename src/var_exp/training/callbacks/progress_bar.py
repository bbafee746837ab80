"""Progress on a terminal, and off it.

On a terminal Lightning's tqdm bar, named after the stage. In a log file a bar floods, so there
it is one plain line now and then.
"""

import sys
import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from var_exp.training.module import data_of, stage_of


def progress_bar(stage: str) -> ProgressBar:
    """The bar that suits where standard error goes."""
    return TerminalBar(stage) if sys.stderr.isatty() else PlainLines(stage)


class TerminalBar(TQDMProgressBar):
    """Lightning's bar, with the stage's name in the place of an epoch number."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5)
        self.stage = stage

    def on_train_start(self, trainer: L.Trainer, *_) -> None:
        super().on_train_start(trainer)
        self.begin(trainer)  # a stage that goes on is within its epoch, whose start is not told

    def on_train_epoch_start(self, trainer: L.Trainer, *_) -> None:
        super().on_train_epoch_start(trainer)
        self.begin(trainer)

    def begin(self, trainer: L.Trainer) -> None:
        self.train_progress_bar.reset(data_of(trainer).num_batches)
        self.train_progress_bar.initial = data_of(trainer).start_batch
        self.train_progress_bar.set_description(self.stage)

    def on_exception(self, trainer: L.Trainer, *_) -> None:
        """Leave bars where they stand: an open one would be drawn again when it is freed."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(
        self, trainer: L.Trainer, module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        loss = stage_of(module).figures.get("train/loss")
        return {} if loss is None else {"loss": float(loss)}


class PlainLines(ProgressBar):
    """A line every tenth of the stage, with the loss and the time left."""

    def __init__(self, stage: str):
        super().__init__()
        self.stage, self.is_enabled = stage, True

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        """Called on all processes but the first."""
        self.is_enabled = False

    def print(self, *words) -> None:
        print(*words, file=sys.stderr, flush=True)

    def on_train_start(self, trainer: L.Trainer, module) -> None:
        self.started, self.first = time.monotonic(), data_of(trainer).start_batch
        self.done = self.first

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        self.done += 1
        total = data_of(trainer).num_batches
        due = self.done % max(1, total // 10) == 0 or self.done == total
        if not self.is_enabled or not due:
            return
        loss = float(stage_of(module).figures["train/loss"])
        rate = (self.done - self.first) / (time.monotonic() - self.started)
        left = (total - self.done) / rate
        self.print(
            f"{self.stage}: batch {self.done}/{total}, loss {loss:.4g}, {rate:.1f} batches/s, "
            f"{left:.0f} s left"
        )
