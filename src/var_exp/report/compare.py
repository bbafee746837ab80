"""Runs side by side: what differs in them, then metrics, curves and pictures.

A metric is only called better than another where the two compare: scores of images when their
protocols agree, metrics of tokens when the tokenizers are configured alike, any metric when the
images are the same.
"""

import math
import string
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from var_exp.report.charts import Chart, Line, draw, hue
from var_exp.report.page import sample_pictures, title_of, write_page
from var_exp.report.panels import fid_by_scale, metric_title, scale_chart
from var_exp.report.run import Run, flatten, read_run
from var_exp.report.tables import ABSENT, facts, plain
from var_exp.report.verdict import few_images, verdict_of
from var_exp.visualization.metrics import (
    STAGE_NAMES,
    UP,
    describe,
    is_of_images,
    is_of_tokens,
    show,
    split_scale,
)
from var_exp.visualization.panels import PANELS, matching

# Keys of a configuration that change no metric: where files lie, how often something is logged.
IRRELEVANT = (
    *("run_dir", "runs_dir", "name", "resume", "objective"),
    *("expected", "logger", "callbacks", "hydra"),
)
# Keys of a protocol that only choose another draw of the same measurement.
SEEDS = ("seed", "sampling.seed")
TOKENIZER_KEYS = ("tokenizer.", "scales.", "model.tokenizer.", "adversary.", "tokenizer_ckpt")
NOT_IMAGES = ("data.root", "data.on_bad_image")


class Cell(NamedTuple):
    """A metric of one run; best: of those that compare."""

    text: str
    best: bool = False
    note: str = ""


class Row(NamedTuple):
    """A metric of all runs; warning: why they do not compare, or ""."""

    key: str
    label: str
    cells: list[Cell]
    warning: str


class Difference(NamedTuple):
    """A key whose value is not the same in all runs."""

    key: str
    values: list[str]


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write a page that lays runs side by side, and return its path.

    Raises:
        ValueError: a folder is named twice.
        OSError: the file cannot be written.
    """
    if len({Path(folder).resolve() for folder in run_dirs}) < len(run_dirs):
        raise ValueError(
            f"report: expected different run folders, got {', '.join(map(str, run_dirs))}"
        )
    runs = [read_run(Path(folder)) for folder in run_dirs]
    return write_page(path, "compare.html", comparison_of(runs))


def comparison_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Collect the content of the template."""
    letters = [string.ascii_uppercase[i % 26] + str(i // 26 or "") for i in range(len(runs))]
    config = differences([run.config for run in runs], IRRELEVANT)
    stages = list(dict.fromkeys(stage for run in runs for stage in reversed(run.stages)))
    protocols = {stage: protocol_differences(runs, stage) for stage in stages}
    rows = {stage: list(metric_rows(runs, stage, config, protocols[stage])) for stage in stages}
    numbers = count()
    return {
        "title": f"{len(runs)} runs side by side",
        "runs": [
            {
                "letter": letter,
                "color": hue(i),
                "title": title_of(run),
                "verdict": verdict_of(run),
                "facts": [(k, v) for k, v in facts(run) if k in ("Started", "Code", "Seed")],
                "pictures": list(sample_pictures(run))[:2],
            }
            for i, (letter, run) in enumerate(zip(letters, runs, strict=True))
        ],
        "warnings": [
            f"{STAGE_NAMES.get(stage, stage)}: {warning}"
            for stage in stages
            for warning in sorted({row.warning for row in rows[stage]} - {""})
        ],
        "config": config,
        "protocols": [(STAGE_NAMES.get(s, s), d) for s, d in protocols.items() if d],
        "environment": differences([run.environment for run in runs], ("command", "date")),
        "tables": [
            {
                "name": STAGE_NAMES.get(stage, stage),
                "rows": [row for row in rows[stage] if not split_scale(row.key)],
                "scales": [row for row in rows[stage] if split_scale(row.key)],
            }
            for stage in stages
            if rows[stage]
        ],
        "charts": [draw(c, f"chart{next(numbers)}") for c in overlays(runs, stages, letters)],
    }


# -- what differs -------------------------------------------------------------------------


def differences(trees: Sequence[dict[str, Any]], ignored: Sequence[str] = ()) -> list[Difference]:
    """Return the keys whose values are not the same everywhere, sorted.

    Args:
        ignored: dotted keys, or first parts of them.
    """
    flat = [flatten(tree) for tree in trees]
    found = []
    for key in sorted({key for tree in flat for key in tree}):
        values = [plain(tree[key]) if key in tree else ABSENT for tree in flat]
        if len(set(values)) > 1 and not {key, key.partition(".")[0]} & set(ignored):
            found.append(Difference(key, values))
    return found


def protocol_differences(runs: Sequence[Run], stage: str) -> list[Difference]:
    """Return what differs in how the scores of a stage were obtained, among runs with scores."""
    trees: list[dict[str, Any] | None] = []
    for run in runs:
        tree = run.metrics.protocols.get(stage)
        has_scores = any(map(is_of_images, run.stage_metrics(stage)))
        trees.append(tree if isinstance(tree, dict) and tree else {} if has_scores else None)
    known = [tree for tree in trees if tree is not None]
    if len(known) < 2:
        return []
    if not all(known):
        words = [ABSENT if t is None else "recorded" if t else "not recorded" for t in trees]
        return [Difference("protocol", words)]
    keys = {difference.key for difference in differences(known, SEEDS)}
    return [d for d in differences([tree or {} for tree in trees]) if d.key in keys]


def why_not(stage: str, key: str, config: list[Difference], protocol: list[Difference]) -> str:
    """Say why a metric of one run does not compare with that of another; "" where it does."""
    if key == "seconds":
        return ""
    changed = [d.key for d in config]
    data = [k for k in changed if k.startswith("data.") and k not in NOT_IMAGES]
    if data:
        return f"no metrics compare, the images differ ({_few(data)})"
    if is_of_images(key):
        reason = _few([d.key for d in protocol])
        words = "scores of images do not compare, their protocols differ"
        return f"{words} ({reason})" if protocol else ""
    codes = [k for k in changed if k.startswith(TOKENIZER_KEYS)]
    if stage == "var" and codes and is_of_tokens(key):
        return f"metrics of tokens do not compare, the tokenizers differ ({_few(codes)})"
    return ""


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


# -- metrics and curves -------------------------------------------------------------------


def metric_rows(
    runs: Sequence[Run], stage: str, config: list[Difference], protocol: list[Difference]
) -> Iterator[Row]:
    """Yield the final metrics of a stage, a cell per run, the best marked where they compare."""
    for key in dict.fromkeys(key for run in runs for key in run.stage_metrics(stage)):
        meaning = describe(key)
        values = [run.stage_metrics(stage).get(key) for run in runs]
        warning = why_not(stage, key, config, protocol)
        texts = [ABSENT if v is None else show(v, meaning) for v in values]
        best = ""
        if meaning.better and not warning and len(set(texts) - {ABSENT}) > 1:
            known = [v for v in values if v is not None and math.isfinite(v)]
            best = show((max if meaning.better == UP else min)(known), meaning)
        cells = [
            Cell(text, text == best, few_images(run, stage, key) if text != ABSENT else "")
            for run, text in zip(runs, texts, strict=True)
        ]
        yield Row(f"{stage}/{key}", meaning.label, cells, warning)


def overlays(runs: Sequence[Run], stages: Sequence[str], letters: Sequence[str]) -> Iterator[Chart]:
    """Yield the FID against scale, then the main curves of each panel, with a line per run."""
    labels = [
        f"{letter} {run.path.resolve().name}" for letter, run in zip(letters, runs, strict=True)
    ]
    lines = list(zip(labels, map(hue, range(len(runs))), runs, strict=True))
    for name in dict.fromkeys(name for run in runs for name in fid_by_scale(run)):
        fids = [(label, color, fid_by_scale(run).get(name, {})) for label, color, run in lines]
        title = f"{describe(name).label}, after each scale"
        yield scale_chart([fid for fid in fids if fid[2]], title)
    for stage in stages:
        histories = [(label, color, run.history.get(stage, {})) for label, color, run in lines]
        for panel in (panel for panel in PANELS if not panel.more):
            logged = [name for *_, history in histories for name in matching(history, panel)]
            for name in dict.fromkeys(name for name in logged if not split_scale(name)):
                title = metric_title(name) if name.startswith("val/") else panel.title
                yield Chart(
                    f"{title}, {STAGE_NAMES.get(stage, stage).lower()}",
                    [Line(a, h[name], color, True) for a, color, h in histories if name in h],
                    panel.unit,
                    factor=panel.factor,
                    linear=panel.linear,
                )
