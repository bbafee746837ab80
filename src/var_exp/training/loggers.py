"""Loggers, and how pictures reach them."""

import os
from pathlib import Path

import numpy as np
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment


def wandb_logger(save_dir: str, version: str, project: str, **options) -> WandbLogger:
    """A W&B run: online where the user is logged in, else offline under `save_dir`.

    Args:
        save_dir: the run folder.
        version: the stage; both stages of a run folder share a group.
        project: the W&B project.
        options: further arguments of `wandb.init`.
    """
    # Without this W&B writes a few lines about itself between ours.
    os.environ.setdefault("WANDB_SILENT", "true")
    group = "/".join(os.path.normpath(save_dir).split(os.sep)[-2:])
    if "mode" not in options and "WANDB_MODE" not in os.environ:
        options["mode"] = "online" if wandb.login(prompt=False) else "offline"
    return WandbLogger(
        name=f"{group}/{version}",
        group=group,
        job_type=version,
        project=project,
        save_dir=save_dir,
        **options,
    )


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which goes on in the file of an interrupted run.

    The original deletes it. Rows that the interrupted run logged after its last checkpoint
    stand twice; for readers the later one counts.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            earlier = path.read_text() if path.exists() else ""
            self._experiment = ExperimentWriter(self.log_dir)
            if earlier:
                path.write_text(earlier)
                self._experiment.metrics_keys = earlier.splitlines()[0].split(",")
        return self._experiment


def log_picture(trainer: Trainer, key: str, picture: np.ndarray, step: int) -> None:
    """Give a uint8 (H, W, 3) array to every logger that takes pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, picture, step, dataformats="HWC")
