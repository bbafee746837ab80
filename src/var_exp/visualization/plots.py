"""Plots of validation metrics: curves with expected bands, and heat maps with a row per scale.

Which metrics stand together is read from `panels`. Drawn with matplotlib's object interface: no
window and no global state, so that it works in any process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from var_exp.visualization.metrics import describe, split_scale
from var_exp.visualization.panels import Band, Curve, Panel, non_empty

STRONG = "#1f3b63"  # metrics of all scales together
GOLD = "#e8b84a"


def curves(history: Mapping[str, Curve], bands: Mapping[str, Band]) -> np.ndarray:
    """Plot the main panels of validation metrics, coarse scales light and fine ones dark.

    Args:
        history: curves by the logged name.
        bands: by the logged name, where a metric is expected to end; drawn behind its curve.

    Returns:
        uint8 (H, W, 3).
    """
    panels = [(p, names) for p, names in non_empty(history, "val/") if not p.more]
    figure, row = _row_of_axes(len(panels))
    for axes, (panel, names) in zip(row, panels, strict=True):
        _plot(axes, panel, names, history, bands)
    return _pixels(figure)


def heat_maps(history: Mapping[str, Curve]) -> np.ndarray:
    """Plot a heat map of each panel of per-scale metrics: scales downwards, validations across.

    Args:
        history: curves by the logged name.

    Returns:
        uint8 (H, W, 3).
    """
    panels = [(p, names) for p, names in non_empty(history, "val/") if p.is_per_scale]
    figure, row = _row_of_axes(len(panels))
    for axes, (panel, names) in zip(row, panels, strict=True):
        batches = sorted({batch for name in names for batch, _ in history[name]})
        values = np.full((len(names), len(batches)), np.nan)
        for i, name in enumerate(names):
            for batch, value in history[name]:
                values[i, batches.index(batch)] = panel.factor * value
        # Colors start at 0 and reach at least 100 %, or small differences would look like collapse.
        top = max(panel.factor, float(np.nanmax(values, initial=0.0)))
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0, vmax=top
        )
        figure.colorbar(image, ax=axes)
        axes.set_yticks(range(len(names)), [_scale(name) for name in names])
        ticks = np.unique(np.linspace(0, len(batches) - 1, min(len(batches), 6)).astype(int))
        axes.set_xticks(ticks, [str(batches[i]) for i in ticks])
        axes.set(title=panel.heading, xlabel="batch", ylabel="scale")
    return _pixels(figure)


def _row_of_axes(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.5 * max(count, 1), 4), dpi=110, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0] if count else []


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _plot(
    axes: Axes,
    panel: Panel,
    names: Sequence[str],
    history: Mapping[str, Curve],
    bands: Mapping[str, Band],
) -> None:
    scales = [name for name in names if split_scale(name)]
    for name in (*scales, *(name for name in names if name not in scales)):
        batches, values = np.transpose(history[name])
        if name in scales:
            shade = 0.15 + 0.8 * scales.index(name) / max(len(scales) - 1, 1)
            style: dict[str, Any] = {"color": colormaps["viridis_r"](shade), "linewidth": 1.2}
            label = f"scale {_scale(name)}"
        else:
            style = {"color": STRONG, "linewidth": 2.2}
            label = describe(name.removeprefix("val/")).label
        axes.plot(batches, panel.factor * values, marker="o", markersize=3, label=label, **style)
        if name in bands:
            low, high = (panel.factor * end for end in bands[name])
            axes.axhspan(low, high, color=GOLD, alpha=0.3, label=f"{label} expected")
    axes.set(title=panel.heading, xlabel="batch")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _scale(name: str) -> str:
    return name.rpartition("_scale_")[2]
