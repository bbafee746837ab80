"""Line charts as inline SVG in the colors and fonts of the page.

matplotlib draws; each color is a stand-in that becomes a CSS variable, so that a chart follows
light and dark. Text stays text. Charts are 360 units wide, the width of a phone.

Libraries that draw SVG themselves were measured on ten curves of 240 points: 38 kB here, 64 kB
with pygal (without its scripts) and 84 kB with leather; neither draws bands behind curves.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from var_exp.visualization.metrics import MINUS
from var_exp.visualization.panels import Curve

WIDTH, HEIGHT = 360, 220  # units of the SVG
MAX_POINTS = 240  # longer curves are drawn as means of neighboring points
LOG_FROM = 50  # ratio of largest to smallest value from which an axis is logarithmic

MUTED, RULE, BAND, ACCENT = "var(--muted)", "var(--rule)", "var(--band)", "var(--accent)"
SHADES = [f"var(--shade-{i})" for i in range(12)]  # of scales, coarse to fine; see style.css
HUES = [f"var(--hue-{i})" for i in range(8)]  # of runs
COLORS = [MUTED, RULE, BAND, ACCENT, *SHADES, *HUES]


def _stand_in(color: str) -> str:
    """Encode a CSS color as one that matplotlib knows; `_inline` decodes it."""
    return f"#0f1e{COLORS.index(color):02x}"


RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, not outlines
    "font.size": 10.5,
    "lines.markersize": 3.2,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.8,
    "grid.color": _stand_in(RULE),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{item}.color": _stand_in(MUTED) for item in ("text", "xtick", "ytick")},
    **{
        f"{axis}tick.major.{key}": value
        for axis in "xy"
        for key, value in (("size", 0), ("pad", 6))
    },
}


class Line(NamedTuple):
    """A curve of a chart; color: in CSS; strong: wider, above the others."""

    label: str
    curve: Curve
    color: str = ACCENT
    strong: bool = False


class Chart(NamedTuple):
    """The content of a chart.

    Attributes:
        bands: (low, high) of expected final values, drawn behind the curves.
        last: the newest value, in words, beside the title.
        ticks: names of positions 0, 1, ... on the x axis; None for batch numbers.
        factor: multiplies values, 100 for percent.
        linear: never logarithmic; otherwise wide ranges of positive values are.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    bands: Sequence[tuple[float, float]] = ()
    last: str = ""
    x_label: str = "batch"
    ticks: Sequence[str] | None = None
    factor: float = 1.0
    linear: bool = False


class Drawing(NamedTuple):
    """A drawn chart, as the templates take it; thinned: curves are means of neighbors."""

    chart: Chart
    svg: Markup
    thinned: bool


def shade(i: int, count: int) -> str:
    """Return the color of scale i of `count`, coarse to fine."""
    return SHADES[round(i * (len(SHADES) - 1) / max(count - 1, 1))]


def hue(i: int) -> str:
    """Return the color of run i."""
    return HUES[i % len(HUES)]


def thin(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """Average equal groups of neighbors, each at its last batch, into at most `limit` points."""
    size = -(-len(curve) // limit)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)] if size > 1 else []
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups] or curve


def draw(chart: Chart, name: str) -> Drawing:
    """Draw a chart; `name` must be unique on the page, so that ids are."""
    factor = chart.factor
    bands = [(factor * low, factor * high) for low, high in chart.bands]
    lines = [
        line._replace(curve=[(x, factor * y) for x, y in thin(line.curve)]) for line in chart.lines
    ]
    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((0.125, 0.165, 0.855, 0.8))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for low, high in bands:
            axes.axhspan(low, high, color=_stand_in(BAND), linewidth=0, zorder=0.4)  # below grid
        for line in sorted(lines, key=lambda line: line.strong):
            batches, values = zip(*line.curve, strict=True)
            style: dict[str, Any] = {
                "color": _stand_in(line.color),
                "linewidth": 2.1 if line.strong else 1.4,
            }
            axes.plot(batches, values, marker="o" if len(values) <= 12 else None, **style)
            axes.plot(batches[-1:], values[-1:], "o", markersize=4.2, **style)
        _scale_axes(axes, chart, lines, bands)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    thinned = any(len(line.curve) > MAX_POINTS for line in chart.lines)
    return Drawing(chart, Markup(_inline(out.getvalue(), _alternative(chart, lines))), thinned)


def _scale_axes(axes: Axes, chart: Chart, lines: list[Line], bands: list) -> None:
    values = [y for line in lines for _, y in line.curve] + [end for band in bands for end in band]
    low, high = min(values), max(values)
    is_log = not chart.linear and low > 0 and high > LOG_FROM * low
    if is_log:  # ends on a grid line below and above, which show the scale
        axes.set_yscale("log")
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ends = [digit * 10.0**decade for decade in decades for digit in (1.0, 3.0)]
        low, high = max(e for e in ends if e <= low), min(e for e in ends if e >= high)
        axes.set_ylim(low, high)
        subs = (1.0, 3.0) if high < 1000 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda y, _: short(y))
    ticks = chart.ticks
    if ticks is None:
        axes.set_xlim(0, 1.03 * max(line.curve[-1][0] for line in lines))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
    else:
        axes.set_xlim(-0.3, len(ticks) - 0.7)
        axes.xaxis.set_major_locator(FixedLocator(range(len(ticks))))
        axes.xaxis.set_major_formatter(lambda x, _: ticks[round(x)])
    label = f"{chart.x_label}, logarithmic upwards" if is_log else chart.x_label
    axes.text(0.5, -0.13, label, transform=axes.transAxes, ha="center", va="top")


def short(value: float) -> str:
    """Format a number for an axis, in at most six characters."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 10 * unit or (size >= unit and unit > 1e3):
            return f"{value / unit:.4g}{name}".replace("-", MINUS)
    for plain in (f"{value:.4g}", f"{value:.3g}"):
        if "e" not in plain and (len(plain) <= 6 or size >= 1):
            return plain.replace("-", MINUS)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)


def _inline(svg: str, label: str) -> str:
    """Drop what only a stand-alone file needs, and numbered ids, which repeat on a page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"| font-family: [^;"]+;?| transform="rotate\(-0 [^"]+"', "", svg)
    # Coordinates to a tenth of a unit: a third of the size, and nobody sees it.
    svg = re.sub(r' (?:d|x|y)="[^"]+', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r"#0f1e(\w\w)", lambda code: COLORS[int(code[1], 16)], svg)
    svg = re.sub(r"\s+", " ", svg.replace("<g/>", ""))
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" {view}>{body}'


def _alternative(chart: Chart, lines: list[Line]) -> str:
    """Describe a chart to a reader who cannot see it."""
    ends = [
        f"{line.label} from {short(line.curve[0][1])} to {short(line.curve[-1][1])}"
        for line in lines[:12]
    ]
    unit = f" in {chart.unit}" if chart.unit else ""
    return f"{chart.title}{unit} over the {chart.x_label}: {'; '.join(ends)}"
