"""Words and figures of a run, as the rows of tables."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from var_exp.report.run import Run
from var_exp.report.verdict import bands_of, main_fid, too_few
from var_exp.visualization.metrics import STAGE_NAMES, describe, show, side, split_scale

ABSENT = "\u2013"


class Row(NamedTuple):
    """A line of the table of figures."""

    key: str
    label: str
    value: str
    note: str
    state: str  # "inside", "above", "below" the expected band, or ""


def tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """(label, figure, note) of the few figures that say most."""
    var, tokenizer = run.figures("var"), run.figures("tokenizer")
    for stage, figures in (("var", var), ("tokenizer", tokenizer)):
        fid = main_fid(figures)
        keys = [fid, *(k for k in figures if k.startswith("class_accuracy") and stage == "var")]
        for key in (*filter(None, keys), *(k for k in ("loss", "psnr") if k in figures)):
            meaning = describe(key)
            label = "Validation cross-entropy" if key == "loss" else meaning.label
            yield label, show(figures[key], meaning), too_few(run, stage, key) or ""
    seconds = [figures["seconds"] for figures in (tokenizer, var) if "seconds" in figures]
    if seconds:
        yield "Training time", show(sum(seconds), describe("seconds")), ""


def facts(run: Run) -> list[tuple[str, str]]:
    """(what, value) of how the run was made."""
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


def figure_rows(run: Run, stage: str) -> Iterator[Row]:
    """All final figures of a stage but those by scale, which have a table of their own."""
    bands = {band.key: band for band in bands_of(run, stage)}
    for key, value in run.figures(stage).items():
        if split_scale(key):
            continue
        meaning = describe(key)
        notes = [f"expected {bands[key].low:g} to {bands[key].high:g}"] if key in bands else []
        notes += filter(None, [too_few(run, stage, key)])
        state = bands[key].where if key in bands else ""
        yield Row(f"{stage}/{key}", meaning.label, show(value, meaning), "; ".join(notes), state)


def scale_table(run: Run) -> dict[str, Any]:
    """Headings and rows: a row for each scale, a column for each figure that there is.

    Of a stage that has not ended those of its last validation.
    """
    columns: dict[tuple[str, str], dict[str, float]] = {}
    validated = False
    for stage in reversed(run.stages):
        values = run.figures(stage)
        if not values:
            values = run.last_validation(stage)
            validated |= bool(values)
        for key, value in values.items():
            parts = split_scale(key)
            if parts:
                columns.setdefault((stage, parts[0]), {})[parts[1]] = value
    sizes = run.scales
    names = [name for name, _, _ in sizes] or list(next(iter(columns.values()), {}))
    tokens = {name: f"{int(h * w):,}" for name, h, w in sizes}
    meanings = {column: describe(column[1]) for column in columns}
    heads = [
        m.label.replace("FID", "FID after it") + (f", {m.unit}" if m.unit else "")
        for m in meanings.values()
    ]
    rows = [
        [
            side(name),
            tokens.get(name, ABSENT),
            *(
                show(values[name], meanings[column], unit=False) if name in values else ABSENT
                for column, values in columns.items()
            ),
        ]
        for name in names
    ]
    return {"heads": ["Scale", "Tokens", *heads], "rows": rows, "validated": validated}


def protocol_groups(tree: Any) -> list[tuple[str, list[tuple[int, str, str | None]]]]:
    """(title, outline) of each part of a protocol; what has no part comes first."""
    items = list(tree.items()) if isinstance(tree, Mapping) else []
    loose = {key: value for key, value in items if not isinstance(value, Mapping)}
    parts = [(str(key), value) for key, value in items if isinstance(value, Mapping)]
    groups = [("general", loose), *parts] if loose else parts
    return [(title.replace("_", " ").capitalize(), list(outline(part))) for title, part in groups]


def outline(tree: Any, depth: int = 0) -> Iterator[tuple[int, str, str | None]]:
    """(depth, name, value) of nested plain data; a name that holds more has no value."""
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
    """A plain value in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
