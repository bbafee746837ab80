"""Figures over a stage's validations as pictures: curves, and heat maps with a row for each scale.

Drawn with matplotlib's object interface: no window, no global state, safe in any process.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # (batch, value)
Band = Sequence[float]  # (low, high)

SINGLE = "#1f3b63"


def curves(
    history: Mapping[str, Curve],
    panels: Mapping[str, Sequence[str]],
    bands: Mapping[str, Band],
) -> np.ndarray:
    """A panel for each group of figures, coarse scales in light colours and fine ones in dark.

    Args:
        history: figures by name.
        panels: title -> the names in it, patterns such as `val/loss_scale_*` allowed. A name
            without a pattern is drawn in bold.
        bands: where a figure is expected to end, drawn behind it.

    Returns:
        uint8 (H, W, 3).
    """
    figure, row = _row_of_axes(len(panels))
    for axes, (title, patterns) in zip(row, panels.items(), strict=True):
        _panel(axes, title, patterns, history, bands)
    return _pixels(figure)


def heat_maps(history: Mapping[str, Curve], panels: Mapping[str, str]) -> np.ndarray:
    """A map for each group of figures: a row for each scale, a column for each validation.

    Args:
        history: figures by name.
        panels: title -> a pattern of names, such as `val/usage_scale_*`.

    Returns:
        uint8 (H, W, 3).
    """
    figure, row = _row_of_axes(len(panels))
    for axes, (title, pattern) in zip(row, panels.items(), strict=True):
        names = [name for name in history if fnmatch(name, pattern)]
        batches = sorted({batch for name in names for batch, _ in history[name]})
        values = np.full((len(names), len(batches)), np.nan)
        for i, name in enumerate(names):
            for batch, value in history[name]:
                values[i, batches.index(batch)] = value
        # Shares from 0 to 1, all else from 0: or small differences would look like a collapse.
        top = max(1.0, float(np.nanmax(values, initial=0.0)))
        image = axes.imshow(
            values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0.0, vmax=top
        )
        figure.colorbar(image, ax=axes)
        axes.set_yticks(range(len(names)), [name.rpartition("scale_")[2] for name in names])
        shown = np.unique(np.linspace(0, len(batches) - 1, min(len(batches), 6)).astype(int))
        axes.set_xticks(shown, [str(batches[i]) for i in shown])
        axes.set(title=title, xlabel="batch", ylabel="scale")
    return _pixels(figure)


def _row_of_axes(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.5 * count, 4), dpi=110, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _panel(
    axes: Axes,
    title: str,
    patterns: Sequence[str],
    history: Mapping[str, Curve],
    bands: Mapping[str, Band],
) -> None:
    shown = []
    for pattern in patterns:
        names = [name for name in history if fnmatch(name, pattern)]
        alone = pattern in names
        for i, name in enumerate(names):
            shade = colormaps["viridis_r"](0.15 + 0.8 * i / max(len(names) - 1, 1))
            what = name.removeprefix("val/")
            batches, values = zip(*history[name], strict=True)
            axes.plot(
                batches,
                values,
                color=SINGLE if alone else shade,
                linewidth=2.2 if alone else 1.2,
                marker="o",
                markersize=3,
                label=what if alone else what[what.find("scale_") :].replace("_", " "),
            )
        shown += names
    for name, (low, high) in bands.items():
        if name in shown:
            label = f"{name.removeprefix('val/')} expected"
            axes.axhspan(low, high, color="#e8b84a", alpha=0.3, label=label)
    axes.set_title(title)
    axes.set_xlabel("batch")
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=7, ncols=2)
