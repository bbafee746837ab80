"""Which figures stand together in a chart."""

import math
from collections.abc import Sequence

from var_exp.report.charts import ACCENT, Chart, Line, hue, shade, short
from var_exp.report.run import Curve, Run
from var_exp.visualization.metrics import describe, network_of, show, side, split_scale
from var_exp.visualization.panels import PANELS, RATE, SHARE, UNDRAWN, Panel, _order, _side, columns

MAX_MORE = 8  # further charts of a stage


def stage_charts(run: Run, stage: str) -> list[Chart]:
    """The charts of a stage for which something was logged."""
    history = run.history.get(stage, {})
    charts = []
    for panel in PANELS:
        names = columns(history, panel)
        if names:
            charts.append(_chart(run, stage, panel, names))
    return charts


def more_charts(run: Run, stage: str) -> list[Chart]:
    """A chart for each column that no panel shows; of those with more than one point."""
    history = run.history.get(stage, {})
    shown = {name for panel in PANELS for name in columns(history, panel)}
    rest = [
        name
        for name, curve in sorted(history.items())
        if name not in shown and not UNDRAWN.fullmatch(name) and len(curve) > 1
    ]
    panels = [Panel(_title(name), _unit(name), (name,)) for name in rest[:MAX_MORE]]
    return [_chart(run, stage, panel, list(panel.patterns)) for panel in panels]


def fid_by_scale(run: Run, stage: str = "var") -> dict[str, dict[str, float]]:
    """FID after each scale: what FID it is -> scale -> figure, coarse to fine."""
    found: dict[str, dict[str, float]] = {}
    for key, value in sorted(run.figures(stage).items(), key=lambda item: _order(item[0])):
        parts = split_scale(key)
        if parts and parts[0].startswith("fid") and math.isfinite(value):
            found.setdefault(parts[0], {})[parts[1]] = value
    return found


def scale_chart(runs: Sequence[tuple[str, str, dict[str, float]]], title: str) -> Chart:
    """A figure against the scale: (label, colour, figures by scale) for each line."""
    names = sorted({name for _, _, values in runs for name in values}, key=_side)
    lines = [
        Line(
            label,
            [(i, values[name]) for i, name in enumerate(names) if name in values],
            colour,
            strong=True,
        )
        for label, colour, values in runs
    ]
    last = ""
    if len(runs) == 1 and names:
        last = show(runs[0][2][names[-1]], describe("fid"))
    ticks = [side(name) for name in names]
    return Chart(title, lines, last=last, x_label="after scale", ticks=ticks)


def _chart(run: Run, stage: str, panel: Panel, names: list[str]) -> Chart:
    history = run.history[stage]
    scales = [name for name in names if split_scale(name)]
    others = [name for name in names if name not in scales]
    lines = [
        Line(side(split_scale(name)[1]), history[name], shade(i, len(scales)))
        for i, name in enumerate(scales)
    ]
    for i, name in enumerate(others):
        label = "all scales" if scales else _title(name)
        lines.append(Line(label, history[name], ACCENT if i == 0 else hue(i), strong=True))
    expected = run.expected(stage)
    bands = [
        expected[key]
        for key in (name.removeprefix("val/") for name in names if name.startswith("val/"))
        if key in expected
    ]
    scale = 100.0 if panel.unit == "%" else 1.0
    # No legend would say of a single line in which features it is.
    title = _title(names[0]) if len(names) == 1 and network_of(names[0][4:]) else panel.title
    return Chart(
        title,
        lines,
        panel.unit,
        bands,
        _last(others, history, panel.unit),
        scale=scale,
        linear=names == [RATE],
    )


def _last(names: list[str], history: dict[str, Curve], unit: str) -> str:
    """The newest figure of a chart, where it has one that counts most."""
    if not names:
        return ""
    value = history[names[0]][-1][1]
    kind, _, key = names[0].partition("/")
    if kind != "val":
        return show(value, SHARE) if unit == "%" else short(value)
    return show(value, describe(key))


def _title(name: str) -> str:
    kind, _, key = name.partition("/")
    label = describe(key).label if kind == "val" else key.replace("_", " ")
    return label if kind == "val" else f"{label[:1].upper()}{label[1:]}"


def _unit(name: str) -> str:
    return describe(name.removeprefix("val/")).unit if name.startswith("val/") else ""
