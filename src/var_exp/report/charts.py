"""Line charts as SVG that stands within a page and takes its colours and letters from there.

Drawn with matplotlib's object interface. Colours are CSS variables of the page, so that a chart
follows light and dark; letters stay text; ids are unique on the page. Charts are about 360 units
wide, the width of a phone, so that they are legible there without being enlarged.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from var_exp.report.run import Curve
from var_exp.visualization.metrics import MINUS

WIDTH, HEIGHT = 360, 220  # in units of the SVG
MAX_POINTS = 240  # of a curve; longer ones are shown as means
LOG_FROM = 50  # largest over smallest value, from where an axis is logarithmic
NUM_SHADES = 12  # --shade-0 ... in style.css, coarse to fine
NUM_HUES = 8  # --hue-0 ...

INK, MUTED, RULE, BAND = "var(--ink)", "var(--muted)", "var(--rule)", "var(--band)"
ACCENT = "var(--accent)"


class Line(NamedTuple):
    """colour: a CSS colour; strong: drawn wider, above the others."""

    label: str
    curve: Curve
    colour: str = ACCENT
    strong: bool = False


class Chart(NamedTuple):
    """What a chart shows.

    Attributes:
        bands: (low, high) behind the curves, where they are expected to end.
        last: the figure beside the title.
        ticks: names of the places on the x axis; None for numbers of batches.
        scale: what values are multiplied by to be shown, 100 for shares in percent.
        linear: never on a logarithmic axis, which wide ranges get otherwise.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    bands: Sequence[tuple[float, float]] = ()
    last: str = ""
    x_label: str = "batch"
    ticks: Sequence[str] | None = None
    scale: float = 1.0
    linear: bool = False


class Drawn(NamedTuple):
    """A chart, ready for the page; legend: (colour, label) of each line."""

    title: str
    unit: str
    last: str
    svg: Markup
    legend: list[tuple[str, str]]
    has_band: bool
    thinned: bool


def shade(i: int, count: int) -> str:
    """The colour of scale i of `count`: light for coarse ones, dark for fine ones."""
    return f"var(--shade-{round(i * (NUM_SHADES - 1) / max(count - 1, 1))})"


def hue(i: int) -> str:
    """The colour of run i."""
    return f"var(--hue-{i % NUM_HUES})"


def thin(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """At most `limit` points: means of equally many neighbours, at the last one's batch."""
    size = -(-len(curve) // limit)
    if size <= 1:
        return curve
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def draw(chart: Chart, name: str) -> Drawn:
    """The chart as SVG; `name` must be unique on the page, and begins its ids."""
    lines = [line._replace(curve=thin(line.curve)) for line in chart.lines if line.curve]
    palette = _Palette()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.patch.set_visible(False)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_axes((0.125, 0.165, 0.855, 0.8))
        _plot(axes, chart, lines, palette)
        out = io.StringIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    words = _alternative(chart, lines)
    return Drawn(
        chart.title,
        chart.unit,
        chart.last,
        Markup(_for_page(out.getvalue(), palette, name, words)),  # of numbers and escaped words
        [(line.colour, line.label) for line in lines],
        bool(chart.bands),
        any(len(line.curve) > MAX_POINTS for line in chart.lines),
    )


class _Palette:
    """Stands in for CSS colours while matplotlib draws, which knows none of them."""

    def __init__(self):
        self.codes: dict[str, str] = {}

    def __call__(self, colour: str) -> str:
        return self.codes.setdefault(colour, f"#0f1e{len(self.codes) + 1:02x}")

    def restore(self, svg: str) -> str:
        for colour, code in self.codes.items():
            svg = svg.replace(code, colour)
        return svg


def _plot(axes: Axes, chart: Chart, lines: list[Line], palette: _Palette) -> None:
    axes.set_axis_off()  # matplotlib's own axes take longer to draw than all the rest
    values = [value * chart.scale for line in lines for _, value in line.curve]
    values += [end * chart.scale for band in chart.bands for end in band]
    is_log = not chart.linear and min(values) > 0 and max(values) > LOG_FROM * min(values)
    axes.set_yscale("log" if is_log else "linear")
    if is_log:  # with a rule below and above, from which the eye can tell what it is
        decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        ends = [digit * 10.0**decade for decade in decades for digit in (1.0, 3.0)]
        axes.set_ylim(
            max(end for end in ends if end <= min(values)),
            min(end for end in ends if end >= max(values)),
        )
    for low, high in chart.bands:
        axes.axhspan(low * chart.scale, high * chart.scale, color=palette(BAND), linewidth=0)
    for line in sorted(lines, key=lambda line: line.strong):
        batches = [batch for batch, _ in line.curve]
        shown = [value * chart.scale for _, value in line.curve]
        style = {"color": palette(line.colour), "marker": "o"}
        size = 3.2 if len(shown) <= 12 else 0
        width = 2.1 if line.strong else 1.4
        axes.plot(batches, shown, linewidth=width, markersize=size, **style)
        axes.plot(batches[-1:], shown[-1:], linestyle="", markersize=4.2, **style)
    last = max(line.curve[-1][0] for line in lines)
    _ticks(axes, chart, last, is_log, palette)


def _ticks(axes: Axes, chart: Chart, last: int, is_log: bool, palette: _Palette) -> None:
    """Rules instead of a frame, short numbers in small letters; batches begin at 0."""
    style = {"fontsize": 10.5, "color": palette(MUTED)}
    left, right = (-0.3, len(chart.ticks) - 0.7) if chart.ticks else (0, 1.03 * last)
    low, high = axes.get_ylim()
    decades = math.log10(high / low) if is_log else 0
    y_locator = LogLocator(subs=(1.0, 3.0) if decades < 3 else (1.0,)) if is_log else MaxNLocator(5)
    for y in y_locator.tick_values(low, high):
        if low <= y <= high:
            axes.axhline(y, color=palette(RULE), linewidth=0.8, zorder=0.5)
            at = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center_baseline"}
            axes.text(-0.02, y, short(y), **at, **style)
    places = dict(enumerate(chart.ticks or ()))
    if chart.ticks is None:
        locator = MaxNLocator(5, integer=True, min_n_ticks=1)
        places = {x: short(x) for x in locator.tick_values(left, right)}
    for x, name in places.items():
        if left <= x <= right:
            at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
            axes.text(x, -0.03, name, **at, **style)
    label = f"{chart.x_label}, logarithmic upwards" if is_log else chart.x_label
    axes.text(0.5, -0.13, label, transform=axes.transAxes, ha="center", va="top", **style)
    axes.set(xlim=(left, right), ylim=(low, high))


def short(value: float) -> str:
    """A number for an axis, in at most six letters."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 10 * unit or (size >= unit and unit > 1e3):
            return f"{value / unit:.4g}{name}".replace("-", MINUS)
    for plain in (f"{value:.4g}", f"{value:.3g}"):
        if "e" not in plain and (len(plain) <= 6 or size >= 1):
            return plain.replace("-", MINUS)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)


def _for_page(svg: str, palette: _Palette, name: str, words: str) -> str:
    """Without what only a file of its own needs, in the page's colours and letters."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r" font-family: [^;]+;", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"|<g/>', "", svg)
    svg = re.sub(r' (?:d|x|y|width|height)="[^"]*"', _rounded, svg)
    svg = palette.restore(re.sub(r"\n\s*", " ", svg))
    head = (
        f'<svg class="chart" role="img" aria-label="{escape(words)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">'
    )
    return head + svg[svg.index(">") + 1 :]


def _rounded(attribute: re.Match) -> str:
    """Coordinates to a tenth of a unit: a third of the size, and nobody sees it."""
    return re.sub(r"(\d+\.\d)\d+", r"\1", attribute[0])


def _alternative(chart: Chart, lines: list[Line]) -> str:
    """What a chart says, for who does not see it."""
    ends = []
    for line in lines[:12]:
        first, last = (value * chart.scale for value in (line.curve[0][1], line.curve[-1][1]))
        ends.append(f"{line.label} from {short(first)} to {short(last)}")
    unit = f" in {chart.unit}" if chart.unit else ""
    return f"{chart.title}{unit} over the {chart.x_label}: {'; '.join(ends)}"
