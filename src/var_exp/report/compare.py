"""Runs side by side: what differs in them first, then figures, curves and pictures.

A figure is only said to be better than another where the two compare: scores of images when
their protocols agree, figures of tokens when the tokenizers were made alike, any figure when the
images are the same.
"""

import math
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from var_exp.io.files import replacing
from var_exp.report.charts import Chart, Line, draw, hue
from var_exp.report.page import render, sample_pictures, title_of
from var_exp.report.panels import fid_by_scale, scale_chart
from var_exp.report.run import Run, flatten, read_run
from var_exp.report.tables import ABSENT, facts, plain
from var_exp.report.verdict import judge, too_few
from var_exp.visualization.metrics import STAGE_NAMES, UP, describe, is_scored, show, split_scale
from var_exp.visualization.panels import PANELS, RATE, columns

# Of a configuration: where files lie and how often something is looked at change no figure.
NO_MATTER = (
    *("run_dir", "runs_dir", "name", "resume", "objective"),
    *("expected", "logger", "callbacks", "hydra"),
)
# Of a protocol: another draw of the same measurement.
DRAWS = ("seed", "sampling.seed")
TOKENIZER_KEYS = ("tokenizer.", "scales.", "model.tokenizer.", "adversary.", "tokenizer_ckpt")
NOT_IMAGES = ("data.root", "data.on_bad_image")


class Cell(NamedTuple):
    """A figure of one run; best: of those that compare."""

    text: str
    best: bool = False
    note: str = ""


class Row(NamedTuple):
    """A figure of all runs; warning: why they do not compare, or ""."""

    key: str
    label: str
    cells: list[Cell]
    warning: str


class Difference(NamedTuple):
    """A key whose value is not the same in all runs."""

    key: str
    values: list[str]


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that lays runs side by side; returns its path.

    Raises:
        ValueError: a folder that is named twice.
        OSError: the page cannot be written.
    """
    if len({Path(folder).resolve() for folder in run_dirs}) < len(run_dirs):
        raise ValueError(
            f"report: expected different run folders, got {', '.join(map(str, run_dirs))}"
        )
    runs = [read_run(Path(folder)) for folder in run_dirs]
    with replacing(path) as unfinished:
        unfinished.write_text(render("compare.html", **comparison_of(runs)), encoding="utf-8")
    return Path(path)


def comparison_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows."""
    letters = [string.ascii_uppercase[i % 26] + str(i // 26 or "") for i in range(len(runs))]
    config = differences([flatten(run.config) for run in runs], _config_matters)
    stages = list(dict.fromkeys(stage for run in runs for stage in reversed(run.stages)))
    protocols = {stage: protocol_differences(runs, stage) for stage in stages}
    names = (f"chart{i}" for i in range(10_000))
    return {
        "title": f"{len(runs)} runs side by side",
        "runs": [
            {
                "letter": letter,
                "colour": hue(i),
                "title": title_of(run),
                "verdict": judge(run),
                "facts": [(k, v) for k, v in facts(run) if k in ("Started", "Code", "Seed")],
                "pictures": list(sample_pictures(run))[:2],
            }
            for i, (letter, run) in enumerate(zip(letters, runs, strict=True))
        ],
        "warnings": list(warnings(runs, config, protocols)),
        "config": config,
        "protocols": [(STAGE_NAMES.get(s, s), d) for s, d in protocols.items() if d],
        "environment": differences([flatten(run.environment) for run in runs], _any),
        "tables": [
            {
                "name": STAGE_NAMES.get(stage, stage),
                "rows": [r for r in rows if not split_scale(r.key)],
                "scales": [r for r in rows if split_scale(r.key)],
            }
            for stage in stages
            if (rows := list(figure_rows(runs, stage, config, protocols[stage])))
        ],
        "charts": [draw(c, next(names)) for c in overlays(runs, stages, letters)],
    }


# -- what differs -------------------------------------------------------------------------


def differences(trees: Sequence[dict[str, Any]], matters: Callable[[str], bool]):
    """Keys whose values are not the same everywhere, in the order of their names."""
    keys = sorted({key for tree in trees for key in tree if matters(key)})
    found = []
    for key in keys:
        values = [plain(tree[key]) if key in tree else ABSENT for tree in trees]
        if len(set(values)) > 1:
            found.append(Difference(key, values))
    return found


def protocol_differences(runs: Sequence[Run], stage: str) -> list[Difference]:
    """What differs in how the scores of a stage were obtained, among runs that have some."""
    trees: list[dict[str, Any] | None] = []
    for run in runs:
        tree = run.protocol.get(stage)
        is_recorded = isinstance(tree, dict) and bool(tree)
        has_scores = any(map(is_scored, run.figures(stage)))
        trees.append(flatten(tree) if is_recorded else {} if has_scores else None)
    there = [tree for tree in trees if tree is not None]
    if len(there) < 2:
        return []
    if not all(there):
        words = [ABSENT if t is None else "recorded" if t else "not recorded" for t in trees]
        return [Difference("protocol", words)]
    keys = {d.key for d in differences(there, _protocol_matters)}
    return differences([tree or {} for tree in trees], keys.__contains__)


def _config_matters(key: str) -> bool:
    return key.partition(".")[0] not in NO_MATTER


def _protocol_matters(key: str) -> bool:
    return key not in DRAWS


def _any(key: str) -> bool:
    return key not in ("command", "date")


def warnings(
    runs: Sequence[Run], config: list[Difference], protocols: dict[str, list[Difference]]
) -> Iterator[str]:
    """Sentences on which figures do not compare, and why."""
    for stage in protocols:
        keys = list(dict.fromkeys(key for run in runs for key in run.figures(stage)))
        reasons = {why_not(stage, key, config, protocols[stage]) for key in keys} - {""}
        for reason in sorted(reasons):
            yield f"{STAGE_NAMES.get(stage, stage)}: {reason}"


def why_not(stage: str, key: str, config: list[Difference], protocol: list[Difference]) -> str:
    """Why a figure of one run does not compare with that of another; "" where it does."""
    if key == "seconds":
        return ""
    changed = [d.key for d in config]
    data = [k for k in changed if k.startswith("data.") and k not in NOT_IMAGES]
    if data:
        return f"no figures compare, the images differ ({_few(data)})"
    if is_scored(key):
        if protocol:
            reason = _few([d.key for d in protocol])
            return f"scores of images do not compare, their protocols differ ({reason})"
        return ""
    codes = [k for k in changed if k.startswith(TOKENIZER_KEYS)]
    if stage == "var" and codes and key.startswith(("loss", "acc", "reducible")):
        return f"figures of tokens do not compare, the tokenizers differ ({_few(codes)})"
    return ""


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


# -- figures and curves -------------------------------------------------------------------


def figure_rows(
    runs: Sequence[Run], stage: str, config: list[Difference], protocol: list[Difference]
) -> Iterator[Row]:
    """Final figures of a stage with a cell for each run, the best marked where they compare."""
    keys = list(dict.fromkeys(key for run in runs for key in run.figures(stage)))
    for key in keys:
        meaning = describe(key)
        values = [run.figures(stage).get(key) for run in runs]
        warning = why_not(stage, key, config, protocol)
        texts = [ABSENT if v is None else show(v, meaning) for v in values]
        best = ""
        if meaning.better and not warning and len(set(texts) - {ABSENT}) > 1:
            there = [v for v in values if v is not None and math.isfinite(v)]
            best = show((max if meaning.better == UP else min)(there), meaning)
        cells = [
            Cell(
                text,
                text == best,
                (too_few(run, stage, key) or "") if value is not None else "",
            )
            for run, value, text in zip(runs, values, texts, strict=True)
        ]
        yield Row(f"{stage}/{key}", meaning.label, cells, warning)


def overlays(runs: Sequence[Run], stages: Sequence[str], letters: Sequence[str]) -> Iterator[Chart]:
    """The main curve of each panel, one line for each run; then FID against scale."""
    labelled = [
        (f"{letter} {run.path.resolve().name}", run)
        for letter, run in zip(letters, runs, strict=True)
    ]
    names = list(dict.fromkeys(name for run in runs for name in fid_by_scale(run)))
    for name in names:
        lines = [
            (label, hue(i), values)
            for i, (label, run) in enumerate(labelled)
            if (values := fid_by_scale(run).get(name))
        ]
        yield scale_chart(lines, f"{describe(name).label}, after each scale")
    for stage in stages:
        for panel in PANELS:
            shown = [name for run in runs for name in columns(run.history.get(stage, {}), panel)]
            for name in dict.fromkeys(n for n in shown if not split_scale(n)):
                lines = [
                    Line(label, run.history[stage][name], hue(i), strong=True)
                    for i, (label, run) in enumerate(labelled)
                    if name in run.history.get(stage, {})
                ]
                title = describe(name.removeprefix("val/")).label
                title = title if name.startswith("val/") else panel.title
                title = f"{title}, {STAGE_NAMES.get(stage, stage).lower()}"
                scale = 100.0 if panel.unit == "%" else 1.0
                yield Chart(title, lines, panel.unit, scale=scale, linear=name == RATE)
