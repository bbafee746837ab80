"""The one table of charts: which metrics stand together in plots, reports and dashboards."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from var_exp.visualization.metrics import split_scale

Curve = Sequence[tuple[int, float]]  # (batch, value), batches counted from 1
Band = Sequence[float]  # (low, high)


class Panel(NamedTuple):
    """A chart.

    Attributes:
        section: the heading it stands under in a dashboard.
        unit: of the values as they are shown; "%": of values logged as shares from 0 to 1.
        patterns: of names of metrics; only a pattern with `_scale_` matches metrics of one scale.
        more: not among the charts that a reader sees first.
        linear: never drawn on a logarithmic axis.
    """

    section: str
    title: str
    unit: str
    patterns: tuple[str, ...]
    more: bool = False
    linear: bool = False

    @property
    def heading(self) -> str:
        """The title with the unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def factor(self) -> float:
        """What logged values are multiplied by to be in the panel's unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def is_per_scale(self) -> bool:
        """Whether every metric in it is of one scale."""
        return all("_scale_" in pattern for pattern in self.patterns)


PANELS = (
    Panel("Transformer", "Validation cross-entropy", "nats", ("val/loss", "val/loss_scale_*")),
    Panel("Transformer", "Token accuracy", "%", ("val/acc", "val/acc_scale_*")),
    Panel("Tokenizer", "PSNR", "dB", ("val/psnr",)),
    Panel("Tokenizer", "SSIM", "", ("val/ssim",), more=True),
    Panel("Tokenizer", "Codebook usage", "%", ("val/usage_scale_*",)),
    Panel("Tokenizer", "Codebook perplexity", "", ("val/perplexity_scale_*",)),
    Panel("Tokenizer", "Loss terms", "", ("train/l1", "train/l2", "train/codebook"), more=True),
    Panel("Image scores", "FID of samples", "", ("val/fid_*",)),
    Panel("Image scores", "FID of reconstructions", "", ("val/rfid_*",)),
    Panel("Image scores", "Classifier accuracy", "%", ("val/class_accuracy*",)),
    Panel("Training", "Training loss", "", ("train/loss",)),
    Panel("Training", "Gradient norm", "", ("train/grad_norm", "train/*grad_norm")),
    Panel("Training", "Learning rate", "", ("train/lr",), linear=True),
    Panel("Training", "Weight decay", "", ("train/weight_decay",), more=True, linear=True),
    Panel("Speed", "Images per second", "", ("speed/images_per_second",)),
    Panel("Speed", "Time waiting for data", "%", ("speed/data_wait",)),
    Panel("Speed", "Model FLOP/s utilization", "%", ("speed/share_of_peak",)),
    Panel("Speed", "Device throughput", "TFLOP/s", ("speed/tflops",), more=True),
    Panel("Speed", "Memory", "GB", ("speed/*memory_gb",), more=True),
    Panel("Speed", "Time left", "h", ("speed/hours_left",), more=True),
)

# Pictures drawn in training, by name, with their captions.
PICTURES = {
    "samples": "Samples, a row for each class",
    "coarse_to_fine": "The image after each scale, coarse to fine",
    "reconstructions": "Validation images and their reconstructions after each scale",
    "codebook": "Codebook usage and perplexity at each scale",
}

# Limits of expected bands, and metrics that another panel or chart shows.
HIDDEN = re.compile(r".*_expected_(low|high)|val/(loss|acc)_last_scale|val/fid_.*_scale_.*")


def matching(names: Iterable[str], panel: Panel) -> list[str]:
    """Return those of the logged metrics that a panel shows, scales from coarse to fine."""
    found: list[str] = []
    for pattern in panel.patterns:
        matches = [
            name
            for name in names
            if fnmatchcase(name, pattern)
            and ("_scale_" in pattern or not split_scale(name))
            and not HIDDEN.fullmatch(name)
            and name not in found
        ]
        found += sorted(matches, key=scale_order)
    return found


def non_empty(history: Mapping[str, Curve], kind: str = "") -> list[tuple[Panel, list[str]]]:
    """Return the panels for which something was logged, each with its metrics.

    Args:
        kind: of metrics, such as `val/`; only panels of these.
    """
    panels = ((panel, matching(history, panel)) for panel in PANELS)
    return [(panel, names) for panel, names in panels if names and names[0].startswith(kind)]


def scale_order(name: str) -> tuple[str, int]:
    """Sort key of metrics: scales from coarse to fine."""
    base, _, scale = name.partition("_scale_")
    return (base, tokens_of(scale)) if split_scale(name) else (name, 0)


def tokens_of(scale: str) -> int:
    """Return the number of tokens of a scale: `4` -> 16, `4x2` -> 8."""
    height, _, width = scale.partition("x")
    return int(height) * int(width or height)
