"""The content of a run folder as plain data.

A run may be young, killed, or of another version of this program: what is missing or damaged is
left out, and reading raises nothing.
"""

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from var_exp.io.run_folder import Metrics, read_json_or_empty, salvage_metrics
from var_exp.visualization.panels import Curve

STAGES = ("tokenizer", "var")
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # to another key of a configuration


@dataclass(frozen=True)
class Run:
    """A run folder that was read.

    Attributes:
        config: the composed configuration; values that only refer to another key are resolved.
        metrics: final metrics, and the protocols of their evaluation.
        history: stage -> column of the CSV file -> curve.
        last_logged: stage -> when its CSV file was last written.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: list[str] = field(default_factory=list)
    metrics: Metrics = Metrics({}, {})
    environment: dict[str, Any] = field(default_factory=dict)
    history: dict[str, dict[str, Curve]] = field(default_factory=dict)
    last_logged: dict[str, datetime] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration by its dotted key."""
        value = look_up(self.config, key)
        return default if value is None else value

    @property
    def stages(self) -> list[str]:
        """The stages that train, in order."""
        named = self.get("stages", [])
        named = [str(stage) for stage in named] if isinstance(named, list) else []
        named = [stage for stage in named if stage != "tokens"]  # nothing is trained in it
        keys = self.metrics.figures
        register_config = {*self.history, *(key.partition("/")[0] for key in keys if "/" in key)}
        return [*named, *sorted(register_config - set(named), key=lambda s: (s not in STAGES, s))]

    def stage_metrics(self, stage: str) -> dict[str, float]:
        """Return the final metrics of a stage, without its name."""
        prefix = f"{stage}/"
        metrics = self.metrics.figures
        return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}

    def last_validation(self, stage: str) -> dict[str, float]:
        """Return the metrics of the newest validation in training, named as final ones are."""
        history = self.history.get(stage, {})
        return {k[4:]: curve[-1][1] for k, curve in history.items() if k.startswith("val/")}

    def expected(self, stage: str) -> dict[str, tuple[float, float]]:
        """Return the bands (low, high) in which metrics of a stage are expected to end."""
        bands = self.get("expected", {})
        found = {}
        for key, band in (bands if isinstance(bands, dict) else {}).items():
            is_band = isinstance(band, list) and len(band) == 2 and all(map(_is_number, band))
            if is_band and key.startswith(f"{stage}/"):
                found[key.removeprefix(f"{stage}/")] = (float(band[0]), float(band[1]))
        return found

    @property
    def scales(self) -> list[tuple[str, int, int]]:
        """(name in metrics, height, width) of each scale, coarse to fine."""
        sizes = self.get("scales.patch_nums", [])
        found = []
        for size in sizes if isinstance(sizes, list) else []:
            pair = size if isinstance(size, list) else [size, size]
            if len(pair) != 2 or not all(map(_is_number, pair)):
                return []
            h, w = pair
            found.append((str(h) if h == w else f"{h}x{w}", h, w))
        return found

    def newest_picture(self, stage: str, name: str) -> tuple[Path, int] | None:
        """Return the last picture of that name drawn in training, and its batch."""
        numbered = {}
        for path in (self.path / stage / "pictures").glob(f"{name}_*.png"):
            number = path.stem.removeprefix(f"{name}_")
            if number.isdigit():
                numbered[int(number)] = path
        return (numbered[max(numbered)], max(numbered)) if numbered else None


def is_run_folder(path: Path) -> bool:
    """Whether anything of a run was recorded there."""
    return any((path / name).exists() for name in (".hydra/config.yaml", "metrics.json", "csv"))


def read_run(path: Path) -> Run:
    """Read whatever of a run folder can be read."""
    config_text = _text(path / ".hydra" / "config.yaml")
    config = _yaml(config_text)
    overrides = _yaml(_text(path / ".hydra" / "overrides.yaml"))
    tables = {table.parent.name: table for table in (path / "csv").glob("*/metrics.csv")}
    return Run(
        path=path,
        config=resolve(config, config) if isinstance(config, dict) else {},
        config_text=config_text,
        overrides=[str(o) for o in overrides] if isinstance(overrides, list) else [],
        metrics=salvage_metrics(path / "metrics.json"),
        environment=read_json_or_empty(path / "environment.json"),
        history={stage: curves(_text(table)) for stage, table in tables.items()},
        last_logged={
            stage: datetime.fromtimestamp(table.stat().st_mtime) for stage, table in tables.items()
        },
    )


def curves(table: str) -> dict[str, Curve]:
    """Read the curves of a CSV file with a `step` column: column -> [(batch, value), ...].

    Rows are sparse. The later row of a step wins, since a resumed run logs some steps twice; a
    last line that is still being written is left out. Steps count from 0, batches from 1.
    """
    lines = table.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    values: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(lines):
        step = _number(row.get("step"))
        if step is None or None in row:  # more cells than columns
            continue
        for name, cell in row.items():
            value = _number(cell)
            if value is not None and name not in ("step", "epoch"):
                values.setdefault(name, {})[int(step) + 1] = value
    return {name: sorted(by_batch.items()) for name, by_batch in values.items()}


def look_up(tree: Any, key: str) -> Any:
    """Return a value by its dotted key, or None."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            tree = tree.get(part)
        else:
            return None
    return tree


def resolve(value: Any, config: dict[str, Any], depth: int = 0) -> Any:
    """Replace each value `${key}` by the value of that key."""
    if isinstance(value, dict):
        return {str(k): resolve(v, config, depth) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, config, depth) for v in value]
    whole = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    found = look_up(config, whole[1]) if whole and depth < 8 else None
    return value if found is None else resolve(found, config, depth + 1)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
