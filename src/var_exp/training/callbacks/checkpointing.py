"""What a stage keeps on the disk, and where it goes on from.

    last.ckpt       the newest state of training; `previous.ckpt` is the one before
    best.ckpt       the state at the best validation

A file is written beside its place, verifies itself, and is on the disk before it takes its place:
a kill at any moment leaves whole files. One that was damaged later is named, and the one before
it is used. A disk that is full stops saving, not training.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from var_exp.checkpoint.checkpoint import read_checkpoint, write_checkpoint
from var_exp.distributed.collectives import all_reduce_max, common_batches
from var_exp.distributed.signals import Interrupted, SignalHandler
from var_exp.training.module import data_of, stage_of
from var_exp.training.resume import BEST, LAST, PREVIOUS


class ChecksummedFiles(CheckpointIO):
    """Reads and writes whole, sealed files; one that cannot be written is no error.

    `failed` says whether the last one could not.
    """

    def __init__(self) -> None:
        self.failed = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(path)
        keep = path.with_name(PREVIOUS) if path.name == LAST else None
        failed_before = self.failed
        try:
            write_checkpoint(checkpoint, path, keep)
            self.failed = False
        except OSError as error:
            self.failed = True
            if not failed_before:
                print(
                    f"checkpoint: {str(path)!r} could not be written ({error.strerror or error}); "
                    f"training goes on and tries again at the next one, what was saved stays",
                    file=sys.stderr,
                    flush=True,
                )

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Save after each validation, every n batches, and when the run is interrupted.

    All processes stop after the same batch, once one of them was asked to. A validation that an
    interruption cut off, or left no time for, is made up for when the stage goes on.

    Args:
        folder: of the stage.
        monitor, mode: the validation figure that the best checkpoint is chosen by; "min" or "max".
        interruption: the signals of this process.
        save_every: batches between further checkpoints; None: at validations only.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        mode: str,
        signal_handler: SignalHandler,
        save_every: int | None = None,
    ):
        self.folder, self.monitor, self.signal_handler = folder, monitor, signal_handler
        self.sign = {"min": -1, "max": 1}[mode]
        self.save_every = save_every
        self.best: float | None = None  # the figure of best.ckpt
        self.best_batch = 0
        self.validation_due = False
        self.loops: dict[str, Any] = {}  # Lightning's after the last batch, where others followed

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_batch", "validation_due")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        if not (self.folder / BEST).exists():  # lost, see `provide_best`
            self.best = None

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.loops = copy.deepcopy(checkpoint["loops"]["fit_loop"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.loops:
            checkpoint["loops"]["fit_loop"] = self.loops

    # -- when ---------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.validation_due:
            return
        validate(trainer)
        if batches_done(trainer) == data_of(trainer).num_batches:
            trainer.should_stop = True  # or Lightning would begin another epoch

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.note_due(trainer)
        self.stop_if_requested(trainer)
        at = self.save_every and batches_done(trainer) % self.save_every == 0
        if at and not self.validation_due:
            self.save(trainer, LAST)

    def note_due(self, trainer: L.Trainer) -> None:
        """To be called after a batch, before whatever may be interrupted."""
        every: Any = trainer.val_check_batch  # a number within `fit`
        self.validation_due = batches_done(trainer) % every == 0
        self.loops = copy.deepcopy(trainer.fit_loop.state_dict()) if self.validation_due else {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, *_
    ) -> None:
        # Some processes may have a batch more than others.
        data = data_of(trainer)
        common = common_batches(len(data.source.val), data.val_batch_size)
        if trainer.state.fn == "fit" and i < common:
            self.stop_if_requested(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.stop_if_requested(trainer)
        self.validation_due, self.loops = False, {}
        score, before = trainer.callback_metrics[self.monitor].item(), (self.best, self.best_batch)
        if self.best is None or self.sign * score > self.sign * self.best:
            self.best, self.best_batch = score, batches_done(trainer)
            if not self.save(trainer, BEST):
                self.best, self.best_batch = before
        self.save(trainer, LAST)

    def stop_if_requested(self, trainer: L.Trainer) -> None:
        """Save and raise Interrupted in all processes, where one of them was sent a signal."""
        number = all_reduce_max(self.signal_handler.received or 0, trainer.strategy.root_device)
        if number:
            saved = self.save(trainer, LAST)
            raise Interrupted(number, saved)

    # -- how ----------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer, name: str) -> bool:
        """Write a file; whether it was written. To be called by all processes."""
        for logger in trainer.loggers:
            logger.save()  # what was logged up to here is not logged again
        trainer.save_checkpoint(self.folder / name)
        # Only the first process writes, and all must agree on what is the best.
        files: Any = trainer.strategy.checkpoint_io  # `ChecksummedFiles`
        failed = int(files.failed)
        written = not all_reduce_max(failed, trainer.strategy.root_device)
        if written and name == BEST:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)  # type: ignore[arg-type]  # ours take any
        return written


def batches_done(trainer: L.Trainer) -> int:
    return stage_of(trainer.lightning_module).batch + 1


def checkpoints_of(trainer: L.Trainer) -> Checkpoints:
    """The callback that `fit_stage` gives every trainer."""
    return trainer.checkpoint_callback  # type: ignore[return-value]


def validate(trainer: L.Trainer) -> None:
    """Run a validation within training, as Lightning's loop over batches does."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # from its first batch
    trainer.validating = True
    loop.run()
    trainer.training = True


# -- starting over, or resuming --------------------------------------------------------------
