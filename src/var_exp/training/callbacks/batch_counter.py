"""Exact continuation: a batch is a pure function of seed, batch number and rank.

`BatchProgress` counts batches in its own checkpoint state, tells the data module where to go
on, seeds every random generator at each batch's start, and tells the module how far the stage
is. With it a run that was interrupted and continued is the uninterrupted run, bit for bit.
"""

import time
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from var_exp.training.module import data_of, stage_of


class BatchProgress(Callback):
    """Count batches; seed and steer by that count.

    Args:
        plan: seed, batch_size, num_batches and tokens.views: what a batch depends on besides
            its number. A run continues under the same plan only.
    """

    def __init__(self, plan: dict[str, Any]):
        self.plan, self.seed = plan, plan["seed"]
        self.batch = 0
        self.earlier_seconds, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall seconds of the stage's training, earlier parts of an interrupted run included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch, "seconds": self.seconds, "plan": self.plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch, self.earlier_seconds = state["batch"], state["seconds"]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Runs before Lightning asks for the loader, and after it has restored this callback.
        data_of(trainer).start_batch = self.batch
        stage_of(module).batch = self.batch - 1  # of a validation that is made up for
        self.started = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch, i: int
    ) -> None:
        total = data_of(trainer).num_batches
        if self.batch + 1 == total:
            # Lightning validates every n batches only; the last one may be none of them.
            trainer.val_check_batch = 1
        words = np.random.SeedSequence([self.seed, self.batch, trainer.global_rank])
        torch.manual_seed(int(words.generate_state(1)[0]))
        stage_of(module).on_progress(self.batch, total)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, i: int
    ) -> None:
        # Here and not in the module, whose hook runs after the checkpoint callbacks have saved.
        self.batch += 1
