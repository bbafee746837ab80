"""Loggers: the same scalars and pictures to CSV, TensorBoard and W&B, whatever fails.

Each of ours takes scalars by Lightning's `log_metrics`, and pictures by
`log_image(key, images, step)`, the signature of Lightning's own W&B logger. Names are `train/...`,
`val/...` and `speed/...`; a step is the number of a batch. In training every logger stands
behind `FaultTolerantLogger`, which lets none of them end a run.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def log_scalars(trainer: Trainer, scalars: Mapping[str, Tensor | float], step: int) -> None:
    """Give numbers, or tensors of one element, to every logger."""
    values = {name: float(value) for name, value in scalars.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values, step)
        logger.save()


def log_picture(trainer: Trainer, key: str, picture: np.ndarray, step: int) -> None:
    """Give a uint8 (H, W, 3) array to every logger."""
    for logger in trainer.loggers:
        logger.log_image(key, [picture], step=step)  # type: ignore[attr-defined]  # ours have it


class ReportOnce:
    """Actions whose failures do not end a run: reported once, tried again quietly.

    A full disk may have room again and a network may come back, hence the further attempts.

    Args:
        title: of what is attempted, for the report.
        loss: what is missing after a failure, for the report.
    """

    def __init__(self, title: str, loss: str):
        self.title, self.loss, self.reported = title, loss, False

    def __call__(self, action: Callable[[], Any], otherwise: Any = None) -> Any:
        """What an action returns, `otherwise` where it fails."""
        try:
            return action()
        except Exception as error:  # whatever the libraries of others raise; no interruption
            self.report(error)
            return otherwise

    @rank_zero_only
    def report(self, error: Exception) -> None:
        if self.reported:
            return
        self.reported = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"{self.title} failed ({reason}); training goes on, {self.loss}",
            file=sys.stderr,
            flush=True,
        )


class FaultTolerantLogger(Logger):
    """A logger whose failures do not end a run, see `ReportOnce`.

    A logger that could not even be made stays away.

    Args:
        make: gives the logger.
        save_dir, version: what it is called with: the run folder, and the stage.
    """

    def __init__(self, make: Callable[..., Logger], save_dir: str, version: str):
        super().__init__()
        self._save_dir, self._version = save_dir, version
        self._title = getattr(make, "func", make).__name__
        self._attempt = ReportOnce(
            f"logger: {self._title}", "what it should have logged may be missing there"
        )
        self.logger: Logger | None = None
        self.logger = self._attempt(lambda: make(save_dir=save_dir, version=version))

    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of the logger, if it has one of this name."""
        if hasattr(type(self.logger), name):
            self._attempt(lambda: getattr(self.logger, name)(*args, **kwargs))

    def _read(self, name: str, otherwise: Any) -> Any:
        if self.logger is None:
            return otherwise
        return self._attempt(lambda: getattr(self.logger, name), otherwise)

    @property
    def name(self) -> str | None:
        return self._read("name", self._title)

    @property
    def version(self) -> int | str | None:
        return self._read("version", self._version)

    @property
    def save_dir(self) -> str | None:
        return self._read("save_dir", self._save_dir)

    @property
    def root_dir(self) -> str | None:
        return self._read("root_dir", None)

    @property
    def log_dir(self) -> str | None:
        return self._read("log_dir", None)

    @property
    def experiment(self) -> Any:
        return self._read("experiment", DummyExperiment())

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        # Lightning adds its epoch, which is the whole stage here, and counts it when a stage goes
        # on at its very end.
        told = {name: value for name, value in metrics.items() if name != "epoch"}
        self._call("log_metrics", told, step=step)

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        self._call("log_image", key, images, step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Tensor | None = None) -> None:
        self._call("log_graph", model, input_array)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._call("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        self._call("finalize", status)

    def finish(self) -> None:
        """Let go of what is held open: a later stage would go on in it."""
        self._call("finish")
