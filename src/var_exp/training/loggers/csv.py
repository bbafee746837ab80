"""Scalars as a CSV file that a resumed run continues."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from var_exp.io.files import atomic_write
from var_exp.visualization.images import save_png


class MetricsFile:
    """Rows of a CSV file, appended; what is there already stays, through kills and full disks.

    A row that was half written when an earlier process died is cut off. A new column rewrites
    the file beside itself. What could not be written is kept and written with the next rows.
    """

    NAME = "metrics.csv"

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / self.NAME
        self.metrics: list[dict[str, Any]] = []  # not written yet; Lightning reads this name
        self.columns: list[str] = []
        self.hparams: dict[str, Any] = {}
        if self.path.exists():
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
            self.columns = next(csv.reader(content.decode().splitlines()), [])

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.metrics.append(row | {"step": step})

    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams |= params
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_hparams_to_yaml(str(self.path.with_name("hparams.yaml")), self.hparams)

    def save(self) -> None:
        if not self.metrics:
            return
        known = set(self.columns).union(*self.metrics)
        if len(known) > len(self.columns):
            self._widen(sorted(known))
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(self.metrics)
        except OSError:
            os.truncate(self.path, size)
            raise
        self.metrics = []

    def _widen(self, columns: Sequence[str]) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
        with atomic_write(self.path) as unfinished, open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self.columns = list(columns)


class ContinuedCSVLogger(CSVLogger):
    """Rows in `<save_dir>/<name>/<version>/metrics.csv`, pictures as PNG files.

    Lightning's own deletes the file of an interrupted run; this one goes on in it. Rows that the
    interrupted run logged after its last checkpoint stand twice; for readers the later one
    counts. Pictures are `<save_dir>/<version>/pictures/<name>_<batches done>.png`.
    """

    _experiment: MetricsFile | None  # type: ignore[assignment]  # in the place of Lightning's

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        return self._experiment

    @property
    def pictures(self) -> Path:
        """Where the pictures go."""
        return Path(self.save_dir, str(self.version), "pictures")

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int) -> None:
        """Write uint8 (H, W, 3) arrays; those after the first get a number."""
        name = key.removeprefix("val/").replace("/", "_")
        for i, image in enumerate(images):
            suffix = f"_{i}" if i else ""
            save_png(image, self.pictures / f"{name}{suffix}_{step + 1:06d}.png")
