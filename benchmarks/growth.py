"""How cost grows: sampling with scales, image size and batch, the training step with depth.

    python -m benchmarks.growth --depth 8 --batch 2 --repeats 3

One size changes at a time, from the sizes of the arguments. An exponent is the slope of the
straight line through the logarithms (least squares): time grows with that power of the size. The
number of scales changes their schedule alone: the last one stays the grid of the image. Sampling is
timed whole and decoding by itself; the difference is the transformer's. Writes
`benchmarks/results/growth_<precision>.json` and, with `--plot`, a picture, and prints the table.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import Spread, in_precision, spread
from benchmarks.limits import CLOCKS, Stopwatch
from benchmarks.networks import draw_codes, draw_labels, make_networks, schedule_for
from benchmarks.training import OurTraining
from var_exp.sampling import decode_in_parts, generate
from var_exp.transformer.backends import AUTO

SCALES = (3, 5, 7, 10, 13, 16)
IMAGE_SIZES = (64, 128, 256, 512)
BATCHES = (1, 2, 4, 8)
DEPTHS = (4, 8, 12, 16)
PARTS = ("whole", "transformer", "decoder")
LABELS = {"scales": "number of scales", "image_size": "pixels of a side"}
Times = dict[str, list[float]]  # seconds of each part, round by round


def schedule_of(num_scales: int, side: int) -> list[int]:
    """So many different sides from 1 to the grid's, as evenly as whole numbers allow.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 < num_scales <= side:
        raise ValueError(f"benchmarks: expected 2 to {side} scales, got {num_scales}")
    return [round(1 + i * (side - 1) / (num_scales - 1)) for i in range(num_scales)]


def time_sampling(args: argparse.Namespace, num_scales: int | None = None) -> Times:
    """Whole images and their decoding."""
    grid = schedule_for(args.image_size).latent_size[0]
    patch_nums = schedule_of(num_scales, grid) if num_scales else None
    transformer, tokenizer = make_networks(args, patch_nums)
    labels, stopwatch = draw_labels(args), Stopwatch(torch.device(args.device), CLOCKS[args.clock])

    def whole() -> Any:
        return generate(transformer, tokenizer, labels, top_k=900, top_p=0.96, return_indices=True)

    with torch.inference_mode(), in_precision(args.precision, args.device):
        indices = whole().indices  # and warm
        times: Times = {part: [] for part in PARTS}
        for _ in range(args.repeats):
            times["whole"].append(stopwatch(whole))
            decoding = stopwatch(lambda: list(decode_in_parts(tokenizer, indices)))
            times["decoder"].append(decoding)
            times["transformer"].append(times["whole"][-1] - decoding)
    return times


def time_training(args: argparse.Namespace) -> Times:
    """A step of the transformer from codes."""
    ours = OurTraining(*make_networks(args), args.precision, AUTO, False)
    codes, labels = draw_codes(args), draw_labels(args)
    stopwatch = Stopwatch(torch.device(args.device), CLOCKS[args.clock])
    ours.step_from_codes(codes, labels)
    steps = [stopwatch(lambda: ours.step_from_codes(codes, labels)) for _ in range(args.repeats)]
    return {"whole": steps}


def sweeps(args: argparse.Namespace) -> Iterator[tuple[str, str, Sequence[int], Callable]]:
    """(work, what grows, its sizes, what times one of them)."""

    def changed(name: str, time_it: Callable) -> Callable:
        return lambda size: time_it(argparse.Namespace(**vars(args) | {name: size}))

    yield "sampling", "scales", args.scales, lambda k: time_sampling(args, k)
    yield "sampling", "image_size", args.image_sizes, changed("image_size", time_sampling)
    yield "sampling", "batch", args.batches, changed("batch", time_sampling)
    yield "training step", "depth", args.depths, changed("depth", time_training)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The power of the size that the time grows with."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each part of each sweep."""
    rows = []
    for work, grows, sizes, time_it in sweeps(args):
        found: dict[str, list[Spread]] = {}
        for size in sizes:
            for part, times in time_it(size).items():
                found.setdefault(part, []).append(spread(times))
            print(f"{work}, {grows} {size}: {found['whole'][-1]} s", flush=True)
            gc.collect()
        for part, spreads in found.items():
            row = {"work": work, "grows": grows, "part": part, "sizes": list(sizes)}
            row["seconds"] = [one._asdict() for one in spreads]
            row["exponent"] = exponent(sizes, [one.median for one in spreads])
            rows.append(row)
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
        axes.set_xlabel(LABELS.get(kind[1], kind[1]))
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
    rows = measure(args)
    found = harness.about(args) | {"results": rows}
    harness.save(f"growth_{args.precision}", found, Path(args.results))
    if args.plot:
        draw(rows, Path(args.plot))
    print(table(rows))


if __name__ == "__main__":
    main()
