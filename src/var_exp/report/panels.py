"""The panels of `visualization.panels` as charts of a run."""

import math
from collections.abc import Sequence

from var_exp.report.charts import ACCENT, Chart, Line, hue, shade, short
from var_exp.report.run import Run
from var_exp.visualization.metrics import (
    SPACE,
    Meaning,
    describe,
    is_fid,
    network_of,
    show,
    side,
    split_scale,
)
from var_exp.visualization.panels import (
    HIDDEN,
    Curve,
    Panel,
    non_empty,
    scale_order,
    tokens_of,
)

MAX_UNLISTED = 8  # charts of metrics that no panel shows
SHARE = Meaning("share", "%", digits=1)


def main_charts(run: Run, stage: str) -> list[Chart]:
    """Return the charts of a stage that a reader sees first, of what was logged."""
    panels = non_empty(run.history.get(stage, {}))
    return [_chart(run, stage, panel, names) for panel, names in panels if not panel.more]


def more_charts(run: Run, stage: str) -> list[Chart]:
    """Return the secondary charts of a stage, then one for each metric without a panel."""
    history = run.history.get(stage, {})
    panels = non_empty(history)
    listed = {name for _, names in panels for name in names}
    unlisted = [
        (Panel("", metric_title(name), _meaning(name).unit, (name,)), [name])
        for name, curve in sorted(history.items())
        if name not in listed and not HIDDEN.fullmatch(name) and len(curve) > 1
    ]
    secondary = [(panel, names) for panel, names in panels if panel.more]
    return [_chart(run, stage, *item) for item in secondary + unlisted[:MAX_UNLISTED]]


def fid_by_scale(run: Run, stage: str = "var") -> dict[str, dict[str, float]]:
    """Return the FID after each scale: name of the FID -> scale -> value, coarse to fine."""
    found: dict[str, dict[str, float]] = {}
    for name, value in sorted(run.stage_metrics(stage).items(), key=lambda i: scale_order(i[0])):
        parts = split_scale(name)
        if parts and is_fid(name) and math.isfinite(value):
            found.setdefault(parts[0], {})[parts[1]] = value
    return found


def scale_chart(runs: Sequence[tuple[str, str, dict[str, float]]], title: str) -> Chart:
    """Return a chart of a metric against the scale.

    Args:
        runs: (label, color, value by scale) of each line.
    """
    scales = sorted({scale for _, _, values in runs for scale in values}, key=tokens_of)
    lines = [
        Line(label, [(i, values[s]) for i, s in enumerate(scales) if s in values], color, True)
        for label, color, values in runs
    ]
    last = show(runs[0][2][scales[-1]], describe("fid")) if len(runs) == 1 and scales else ""
    ticks = [side(scale) for scale in scales]
    return Chart(title, lines, last=last, x_label="after scale", ticks=ticks)


def metric_title(name: str) -> str:
    """Name a logged metric in words."""
    return _meaning(name).label


def _meaning(name: str) -> Meaning:
    kind, _, key = name.partition("/")
    words = key.replace("_", " ")
    return describe(key) if kind == "val" else Meaning(f"{words[:1].upper()}{words[1:]}")


def _chart(run: Run, stage: str, panel: Panel, names: list[str]) -> Chart:
    history = run.history[stage]
    scales = [name for name in names if split_scale(name)]
    others = [name for name in names if name not in scales]
    lines = [
        Line(side(name.rpartition("_scale_")[2]), history[name], shade(i, len(scales)))
        for i, name in enumerate(scales)
    ]
    for i, name in enumerate(others):
        label = "all scales" if scales else metric_title(name)
        lines.append(Line(label, history[name], hue(i) if i else ACCENT, strong=True))
    bands = run.expected(stage)
    # A single line has no legend, which would name its feature network.
    name = names[0].removeprefix("val/")
    return Chart(
        metric_title(names[0]) if len(names) == 1 and network_of(name) else panel.title,
        lines,
        panel.unit,
        [band for key, band in bands.items() if f"val/{key}" in names],
        _last(others[0], history, panel) if others else "",
        factor=panel.factor,
        linear=panel.linear,
    )


def _last(name: str, history: dict[str, Curve], panel: Panel) -> str:
    """Format the newest value of the metric that matters most in a chart."""
    value = history[name][-1][1]
    if name.startswith("val/"):
        return show(value, _meaning(name))
    if panel.unit == "%":
        return show(value, SHARE)
    return f"{short(value)}{SPACE}{panel.unit}" if panel.unit else short(value)
