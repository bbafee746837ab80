"""How cost grows: sampling with scales, image size and batch, the training step with depth.

    python -m benchmarks.growth --depth 8 --batch 1 --repeats 3

One size is changed at a time, from those of the arguments, with what belongs to it: the last scale
stays the grid of the image, an image size has its schedule, and a depth d the width 64 d. An
exponent is the slope of the straight line through the logarithms (least squares): time grows with
that power of the size. Sampling is timed whole and decoding the codes by itself; what is left is
drawing the codes: the transformer, the filters, and what it reads at the next scale. All sizes take
turns, as `benchmarks/harness.py` says. Writes `benchmarks/results/growth_<precision>.json` and,
with `--plot`, a picture, and prints the table.
"""

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import in_precision, spread
from benchmarks.limits import CLOCKS, Stopwatch
from benchmarks.networks import draw_codes, draw_labels, make_networks, schedule_for
from benchmarks.sampling import CFG_SCALE, FILTER
from benchmarks.training import OurTraining
from var_exp.ops.attention import AUTO
from var_exp.ops.memory import keep_memory
from var_exp.sampling.generate import Samples, decode_in_parts, generate

SCALES = (3, 5, 7, 10, 13, 16)
IMAGE_SIZES = (64, 128, 256, 512)
BATCHES = (1, 2, 4, 8)
DEPTHS = (4, 8, 12, 16)
PARTS = ("whole", "drawing", "decoding")
LABELS = {
    "scales": "number of scales",
    "image_size": "pixels of a side",
    "batch": "images at once",
    "depth": "depth d, width 64 d",
}
Timer = Callable[[], dict[str, float]]  # does it once: seconds of each part


def schedule_of(num_scales: int, side: int) -> list[int]:
    """So many different sides from 1 to the grid's, as evenly as whole numbers allow.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 < num_scales <= side:
        raise ValueError(f"benchmarks: expected 2 to {side} scales, got {num_scales}")
    return [round(1 + i * (side - 1) / (num_scales - 1)) for i in range(num_scales)]


def sampling_timer(args: argparse.Namespace, num_scales: int | None = None) -> Timer:
    """Whole images, and their decoding."""
    grid = schedule_for(args.image_size).latent_size[0]
    patch_nums = schedule_of(num_scales, grid) if num_scales else None
    networks = make_networks(args, patch_nums)
    labels, stopwatch = draw_labels(args), Stopwatch(torch.device(args.device), CLOCKS[args.clock])
    drawn: list[Samples] = []

    def run() -> dict[str, float]:
        with torch.inference_mode(), in_precision(args.precision, args.device):
            settings = FILTER | {"cfg_scale": CFG_SCALE, "return_indices": True}
            whole = stopwatch(lambda: drawn.append(generate(*networks, labels, **settings)))
            indices = drawn.pop().indices
            decoding = stopwatch(lambda: list(decode_in_parts(networks[1], indices)))
        return {"whole": whole, "drawing": whole - decoding, "decoding": decoding}

    return run


def training_timer(args: argparse.Namespace) -> Timer:
    """A step of the transformer from codes."""
    ours = OurTraining(*make_networks(args), args.precision, AUTO, False)
    codes, labels = draw_codes(args), draw_labels(args)
    stopwatch = Stopwatch(torch.device(args.device), CLOCKS[args.clock])
    return lambda: {"whole": stopwatch(lambda: ours.step_from_codes(codes, labels))}


def sweeps(args: argparse.Namespace) -> Iterator[tuple[str, str, dict[int, Timer]]]:
    """(work, what grows, a timer for each size)."""

    def changed(name: str, make: Callable[..., Timer]) -> dict[int, Timer]:
        sizes = getattr(args, f"{name}s" if name != "batch" else "batches")
        return {n: make(argparse.Namespace(**vars(args) | {name: n})) for n in sizes}

    yield "sampling", "scales", {n: sampling_timer(args, n) for n in args.scales}
    yield "sampling", "image_size", changed("image_size", sampling_timer)
    yield "sampling", "batch", changed("batch", sampling_timer)
    yield "training step", "depth", changed("depth", training_timer)


def in_rounds(timers: dict[int, Timer], repeats: int) -> list[dict[int, dict[str, float]]]:
    """Seconds of each size and part, round by round, after one round that does not count."""
    for timer in timers.values():
        timer()
    return [{size: timer() for size, timer in timers.items()} for _ in range(repeats)]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The power of the size that the time grows with; nan where a time is not above zero."""
    if min(seconds) <= 0:  # a difference of two times may be
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def fitted(
    work: str, grows: str, rounds: list[dict[int, dict[str, float]]]
) -> list[dict[str, Any]]:
    """A row for each part: medians and quartiles at each size, and the exponent of the medians."""
    rows, sizes = [], list(rounds[0])
    for part in rounds[0][sizes[0]]:
        spreads = [spread([times[size][part] for times in rounds]) for size in sizes]
        row = {"work": work, "grows": grows, "part": part, "sizes": sizes}
        row["seconds"] = [one._asdict() for one in spreads]
        row["exponent"] = exponent(sizes, [one.median for one in spreads])
        rows.append(row)
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for work, grows, timers in sweeps(args):
        rows += fitted(work, grows, in_rounds(timers, args.repeats))
        print(f"{work}, {grows}: {rows[-1]['sizes']} measured", flush=True)
        del timers
        gc.collect()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells = [["work", "grows with", "part", "median seconds at each size", "exponent"]]
    for row in rows:
        points = zip(row["sizes"], row["seconds"], strict=True)
        listed = ", ".join(f"{size}: {one['median']:.3g}" for size, one in points)
        cells.append([row["work"], row["grows"], row["part"], listed, f"{row['exponent']:.2f}"])
    return harness.markdown(cells)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each sweep, both axes logarithmic, quartiles as bars."""
    kinds = list(dict.fromkeys((row["work"], row["grows"]) for row in rows))
    figure = Figure(figsize=(3.4 * len(kinds), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for row in (row for row in rows if (row["work"], row["grows"]) == kind):
            middle, low, high = (
                np.array([one[key] for one in row["seconds"]]) for key in ("median", "low", "high")
            )
            label = f"{row['part']}, exponent {row['exponent']:.2f}"
            bars = (middle - low, high - middle)
            axes.errorbar(row["sizes"], middle, bars, marker="o", markersize=4, label=label)
        axes.set(xscale="log", yscale="log", title=kind[0], ylabel="seconds")
        axes.set_xlabel(LABELS[kind[1]])
        axes.set_xticks(row["sizes"], [str(size) for size in row["sizes"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"type": int, "nargs": "+"}
    parser.add_argument("--scales", default=SCALES, **sizes, help="how many")
    parser.add_argument("--image-sizes", default=IMAGE_SIZES, **sizes, help="pixels of a side")
    parser.add_argument("--batches", default=BATCHES, **sizes, help="images sampled at once")
    parser.add_argument("--depths", default=DEPTHS, **sizes, help="of the transformer in training")
    parser.add_argument("--plot", help="file of the picture")


def main(arguments: list[str] | None = None) -> None:
    args = harness.parse(__doc__.splitlines()[0], arguments, add_arguments)
    keep_memory()  # as our programs do
    rows = measure(args)
    found = harness.about(args) | {"results": rows}
    harness.save(f"growth_{args.precision}", found, Path(args.results))
    if args.plot:
        draw(rows, Path(args.plot))
    print(table(rows))


if __name__ == "__main__":
    main()
