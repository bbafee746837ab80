"""Which metrics stand together in a chart: one table for plots, report and dashboards."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from var_exp.visualization.metrics import Meaning, split_scale

Curve = list[tuple[int, float]]  # (batch, value), batches counted from 1

RATE = "train/lr"  # whose course is known from its form
SHARE = Meaning("share", "%", digits=1)


class Panel(NamedTuple):
    """patterns: of CSV columns; those with a scale in their name only where `_scale_` is asked."""

    title: str
    unit: str
    patterns: Sequence[str]


PANELS = (
    Panel("Cross-entropy, validation", "nats", ("val/loss", "val/loss_scale_*")),
    Panel("Tokens right, validation", "%", ("val/acc", "val/acc_scale_*")),
    Panel("PSNR, validation", "dB", ("val/psnr",)),
    Panel("FID of samples", "", ("val/fid_*",)),
    Panel("FID of reconstructions", "", ("val/rfid_*",)),
    Panel("Images judged right", "%", ("val/class_accuracy*",)),
    Panel("Codes in use", "%", ("val/usage_scale_*",)),
    Panel("Perplexity of codes", "", ("val/perplexity_scale_*",)),
    Panel("Training loss", "", ("train/loss",)),
    Panel("Gradient norm", "", ("train/grad_norm", "train/*grad_norm")),
    Panel("Learning rate", "", (RATE,)),
    Panel("Images per second", "", ("speed/images_per_second",)),
    Panel("Time spent waiting for data", "%", ("speed/data_wait",)),
    Panel("Speed, share of that of a large matrix product", "%", ("speed/share_of_peak",)),
)


# Ends of bands are drawn as bands; the rest are drawn in other charts, or as a part of them.
UNDRAWN = re.compile(r".*_expected_(low|high)|val/(loss|acc)_last_scale|val/fid_.*_scale_.*")


def columns(history: dict[str, Curve], panel: Panel) -> list[str]:
    """The columns of a panel that were logged; scales from coarse to fine."""
    found = []
    for pattern in panel.patterns:
        names = [name for name in history if fnmatch(name, pattern) and name not in found]
        if "_scale_" not in pattern:
            names = [name for name in names if not split_scale(name)]
        found += sorted(names, key=_order)
    return [name for name in found if not UNDRAWN.fullmatch(name)]


def _order(name: str) -> tuple[str, int]:
    parts = split_scale(name)
    return (parts[0], _side(parts[1])) if parts else (name, 0)


def _side(scale: str) -> int:
    height, _, width = scale.partition("x")
    return int(height) * int(width or height)
