"""The run folder: its metrics.json, and the link to the newest run."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from var_exp.io.files import atomic_write

PROTOCOL = "protocol"  # the key of metrics.json that is no figure


def delete_scores(path: Path) -> None:
    """Take the figures of samples out of a metrics.json; those of other stages stay.

    Raises:
        ValueError: the file is damaged.
    """
    metrics = read_figures(path)
    if not metrics:
        return
    kept = {key: value for key, value in metrics.items() if not key.startswith("sample/")}
    kept["protocol"] = {k: v for k, v in metrics.get("protocol", {}).items() if k != "sample"}
    if not kept["protocol"]:
        del kept["protocol"]
    if kept:
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(kept, indent=2) + "\n")
    else:
        path.unlink()


def remove_if_empty(run_dir: Path) -> None:
    """Delete the folder that Hydra made for a run, and the folder around it, if they are empty."""
    for folder in (run_dir, run_dir.parent):
        if folder.resolve() != Path.cwd():
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def point_latest(runs_dir: Path, run_dir: Path) -> None:
    """Make `runs_dir / latest` point to this run."""
    runs_dir, run_dir = runs_dir.resolve(), run_dir.resolve()  # a run may be named by `latest`
    with atomic_write(runs_dir / "latest") as link:
        link.symlink_to(os.path.relpath(run_dir, runs_dir), target_is_directory=True)


class Metrics(NamedTuple):
    """figures: keyed `stage/metric`; protocols: how those of a stage were obtained."""

    figures: dict[str, float]
    protocols: dict[str, dict[str, Any]]

    def with_stage(
        self, stage: str, figures: Mapping[str, float], protocol: dict[str, Any]
    ) -> "Metrics":
        """With the figures of one more stage, keyed without its name."""
        keyed = {f"{stage}/{name}": value for name, value in figures.items()}
        return Metrics(self.figures | keyed, self.protocols | {stage: protocol})


def read_metrics(path: Path) -> Metrics:
    """The figures of a run folder so far; none where nothing was written yet.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_figures(path)
    return Metrics({k: v for k, v in content.items() if k != PROTOCOL}, content.get(PROTOCOL, {}))


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Write figures as flat JSON, and the protocols under one more key."""
    with atomic_write(path) as unfinished:
        content = metrics.figures | {PROTOCOL: metrics.protocols}
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


def read_figures(path: Path) -> dict[str, Any]:
    """The content of a metrics.json; empty where there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):  # no JSON, no text, or no object
        raise ValueError(
            f"{path} is damaged; delete it, and the same command measures its own figures again"
        ) from None


def salvage_metrics(path: Path) -> Metrics:
    """Read the numbers and protocols of a metrics.json that have their right type.

    Unlike `read_metrics`, raises nothing: for reports, which show what can be shown.
    """
    content = read_json_or_empty(path)
    protocols = content.pop(PROTOCOL, {})
    numbers = {k: float(v) for k, v in content.items() if type(v) in (int, float)}
    return Metrics(numbers, protocols if isinstance(protocols, dict) else {})


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where it is missing, damaged or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
