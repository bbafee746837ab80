"""The rows of the tables of a run."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from var_exp.report.run import Run
from var_exp.report.verdict import bands_of, few_images
from var_exp.visualization.metrics import (
    STAGE_NAMES,
    describe,
    is_class_accuracy,
    main_fid,
    show,
    side,
    split_scale,
)

ABSENT = "\u2013"


class Row(NamedTuple):
    """A row of the table of metrics; position to the expected band: inside, above, below or ""."""

    key: str
    label: str
    value: str
    note: str
    position: str


def tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, note) of the few metrics that say most."""
    seconds = []
    for stage in ("var", "tokenizer"):
        metrics = run.stage_metrics(stage)
        accuracies = filter(is_class_accuracy, metrics) if stage == "var" else ()
        keys = (main_fid(metrics), *accuracies, "loss", "psnr")
        for key in (key for key in keys if key in metrics):
            label = "Validation cross-entropy" if key == "loss" else describe(key).label
            yield label, show(metrics[key], describe(key)), few_images(run, stage, key)
        seconds += [metrics["seconds"]] if "seconds" in metrics else []
    if seconds:
        yield "Training time", show(sum(seconds), describe("seconds")), ""


def facts(run: Run) -> list[tuple[str, str]]:
    """Return (name, value) of what was run, and how."""
    env = run.environment
    commit = env.get("git_commit")
    state = " with changes" if env.get("git_dirty") else ""
    versions = env.get("versions")
    versions = versions if isinstance(versions, Mapping) else {}
    python = [f"Python {env['python']}"] if env.get("python") else []
    rows = {
        "Command": env.get("command"),
        "Started": env.get("date"),
        "Code": f"{commit}{state}" if commit else None,
        "Machine": env.get("machine"),
        "Versions": ", ".join([*python, *(f"{k} {v}" for k, v in versions.items())]),
        "Seed": run.get("seed"),
        "Data": run.get("data.name"),
        "Stages": ", ".join(STAGE_NAMES.get(s, s).lower() for s in run.stages),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def metric_rows(run: Run, stage: str) -> Iterator[Row]:
    """Yield the final metrics of a stage; those of single scales have a table of their own."""
    bands = {band.key: band for band in bands_of(run, stage)}
    for key, value in run.stage_metrics(stage).items():
        if split_scale(key):
            continue
        meaning, band = describe(key), bands.get(key)
        notes = [f"expected {band.low:g} to {band.high:g}"] if band else []
        note = "; ".join(filter(None, [*notes, few_images(run, stage, key)]))
        position = band.position if band else ""
        yield Row(f"{stage}/{key}", meaning.label, show(value, meaning), note, position)


def scale_table(run: Run) -> dict[str, Any]:
    """Return headings and rows: a row for each scale, a column for each metric.

    Of a stage that has not ended, the metrics of its last validation.
    """
    columns: dict[tuple[str, str], dict[str, float]] = {}
    validated = False
    for stage in reversed(run.stages):
        metrics = run.stage_metrics(stage)
        if not metrics:
            metrics = run.last_validation(stage)
            validated |= bool(metrics)
        for key, value in metrics.items():
            if parts := split_scale(key):
                columns.setdefault((stage, parts[0]), {})[parts[1]] = value
    meanings = [describe(key) for _, key in columns]
    heads = [
        m.label.replace("FID", "FID after it") + (f", {m.unit}" if m.unit else "") for m in meanings
    ]
    tokens = {name: f"{int(h * w):,}" for name, h, w in run.scales}
    rows = [
        [side(scale), tokens.get(scale, ABSENT)]
        + [
            show(values[scale], meaning, unit=False) if scale in values else ABSENT
            for meaning, values in zip(meanings, columns.values(), strict=True)
        ]
        for scale in list(tokens) or list(next(iter(columns.values()), {}))
    ]
    return {"heads": ["Scale", "Tokens", *heads], "rows": rows, "validated": validated}


def protocol_groups(tree: Any) -> list[tuple[str, list[tuple[int, str, str | None]]]]:
    """Return (title, outline) of each part of a protocol; values outside of parts come first."""
    items = list(tree.items()) if isinstance(tree, Mapping) else []
    loose = {key: value for key, value in items if not isinstance(value, Mapping)}
    parts = [(str(key), value) for key, value in items if isinstance(value, Mapping)]
    groups = [("general", loose), *parts] if loose else parts
    return [(title.replace("_", " ").capitalize(), list(outline(part))) for title, part in groups]


def outline(tree: Any, depth: int = 0) -> Iterator[tuple[int, str, str | None]]:
    """Yield (depth, name, value) of nested plain data; the value of a heading is None."""
    items = tree.items() if isinstance(tree, Mapping) else [("", tree)]
    for key, value in items:
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield depth, name, None
            yield from outline(value, depth + 1)
        elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
            yield depth, name, None
            yield from outline({str(i + 1): v for i, v in enumerate(value)}, depth + 1)
        else:
            yield depth, name, plain(value)


def plain(value: Any) -> str:
    """Write a plain value in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
