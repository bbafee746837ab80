"""Metric names: what they mean, in which unit values are shown, and which direction is better.

A name is a key of `metrics.json` without its stage, or a CSV column without `val/`:
`fid_<network>`, `loss_scale_<side>`, `class_accuracy_<classifier>`, with `_raw` or `_averaged` at
the end for the weights that are not evaluated by default.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

STAGE_NAMES = {"tokenizer": "Tokenizer", "var": "Transformer"}
NETWORKS = {
    "classifier": "classifier features",
    "inception": "Inception",
    "dinov2": "DINOv2 features",
    "clip": "CLIP features",
}
NUM_FEATURES = {"inception": 2048}  # where no protocol records it
SCALE = re.compile(r"(.+)_scale_(\d+(?:x\d+)?)")
SPACE = "\u202f"  # between number and unit: narrow, without a line break
MINUS = "\u2212"

UP, DOWN = "larger", "smaller"


class Meaning(NamedTuple):
    """label: in words; better: UP, DOWN or None; digits: decimals, None for 4 significant."""

    label: str
    unit: str = ""
    better: str | None = None
    digits: int | None = None


KNOWN = {
    "loss": Meaning("Cross-entropy", "nats", DOWN, 3),
    "reducible_loss": Meaning("Reducible cross-entropy", "nats", DOWN, 3),
    "loss_above_law": Meaning("Cross-entropy above the scaling law", "nats", DOWN, 3),
    "acc": Meaning("Token accuracy", "%", UP, 1),
    "psnr": Meaning("PSNR", "dB", UP, 2),
    "ssim": Meaning("SSIM", "", UP, 4),
    "lpips": Meaning("LPIPS", "", DOWN, 4),
    "l1": Meaning("L1 distance", "", DOWN),
    "l2": Meaning("L2 distance", "", DOWN),
    "usage": Meaning("Codebook usage", "%", UP, 1),
    "perplexity": Meaning("Codebook perplexity", "", None, 1),
    "seconds": Meaning("Training time", "s"),
}
BY_NETWORK = {
    "fid": Meaning("FID", "", DOWN, 2),
    "rfid": Meaning("rFID", "", DOWN, 2),
    "kid": Meaning("KID", "", DOWN, 5),
    "inception_score": Meaning("Inception Score", "", UP, 2),
    "precision": Meaning("Precision", "", UP, 3),
    "recall": Meaning("Recall", "", UP, 3),
    "neighbour_ratio": Meaning("Distance to training images (held-out: 1)", "", None, 2),
}
PREFIXES = (*BY_NETWORK, *(f"r{kind}" for kind in BY_NETWORK))  # r: of reconstructions
BY_CLASSIFIER = {
    "class_accuracy_real": Meaning("Classifier accuracy on real images", "%", None, 1),
    "class_accuracy": Meaning("Classifier accuracy", "%", UP, 1),
}
ENDINGS = {
    "_raw": ", raw weights",
    "_averaged": ", averaged weights",
    "_last_scale": " at the last scale",
}


def describe(name: str) -> Meaning:
    """Return the meaning of a metric; an unknown name is shown without underscores."""
    for ending, words in ENDINGS.items():
        if name.endswith(ending):
            meaning = describe(name.removesuffix(ending))
            return meaning._replace(label=meaning.label + words)
    if parts := split_scale(name):
        meaning = describe(parts[0])
        # An FID is of the image after a scale, other metrics are of the scale itself.
        where = "after" if is_fid(name) else "at"
        return meaning._replace(label=f"{meaning.label}, {where} {side(parts[1])}")
    if name in KNOWN:
        return KNOWN[name]
    kind, rest = _split(name, PREFIXES)
    if kind:
        meaning = BY_NETWORK.get(kind) or BY_NETWORK[kind[1:]]
        label = meaning.label if kind in BY_NETWORK else f"{meaning.label} of reconstructions"
        return meaning._replace(label=label + _features(rest))
    kind, rest = _split(name, BY_CLASSIFIER)
    if kind:
        meaning = BY_CLASSIFIER[kind]
        features = "" if rest in ("", "classifier") else f", {rest}"
        return meaning._replace(label=meaning.label + features)
    return Meaning(name.replace("_", " ").replace("/", ": "))


# -- kinds of metrics ---------------------------------------------------------------------


def is_fid(name: str) -> bool:
    """Whether a metric is an FID, of samples or of reconstructions."""
    return name.startswith(("fid", "rfid"))


def is_class_accuracy(name: str) -> bool:
    """Whether a metric is the classifier's accuracy on generated or reconstructed images."""
    return name.startswith("class_accuracy") and not name.startswith("class_accuracy_real")


def is_of_images(name: str) -> bool:
    """Whether a metric scores images, and so depends on the protocol of its evaluation."""
    return bool(_split(name, (*PREFIXES, *BY_CLASSIFIER))[0])


def is_of_tokens(name: str) -> bool:
    """Whether a metric of the transformer depends on the tokenizer that made the tokens."""
    return name.startswith(("loss", "acc", "reducible"))


def main_fid(names: Iterable[str]) -> str | None:
    """Return the FID to name first: with Inception where there is one; None without any."""
    names = [n for n in names if is_fid(n) and not n.endswith(("_raw", "_averaged"))]
    names = [name for name in names if not split_scale(name)]
    return min(names, key=lambda name: network_of(name) != "inception", default=None)


def network_of(name: str) -> str | None:
    """Return the feature network in a name: `fid_inception_scale_4` -> `inception`."""
    rest = _split(name, PREFIXES)[1]
    return _split(rest, NETWORKS)[0] or rest.partition("_")[0] or None


def split_scale(name: str) -> tuple[str, str] | None:
    """Split `loss_scale_4` -> (`loss`, `4`); None for metrics of all scales together."""
    found = SCALE.fullmatch(name)
    return (found[1], found[2]) if found else None


def side(scale: str) -> str:
    """Write a scale in words: `4` -> 4×4, `4x2` -> 4×2."""
    return scale.replace("x", "×") if "x" in scale else f"{scale}×{scale}"


def _split(name: str, prefixes: Iterable[str]) -> tuple[str, str]:
    """Split a known prefix off: `rkid_clip_adm` -> (`rkid`, `clip_adm`); ("", "") without one."""
    for prefix in prefixes:
        if name == prefix or name.startswith(f"{prefix}_"):
            return prefix, name[len(prefix) + 1 :]
    return "", ""


def _features(rest: str) -> str:
    """Name the features: `inception_adm` -> `, Inception, crop adm`."""
    network, crop = _split(rest, NETWORKS)
    if network:
        return f", {NETWORKS[network]}" + (f", crop {crop}" if crop else "")
    return f", {rest} features" if rest else ""


# -- values -------------------------------------------------------------------------------


def show(value: float, meaning: Meaning, unit: bool = True) -> str:
    """Format a value for people: rounded, with its unit, shares in percent."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if meaning.unit == "s":
        return duration(value)
    if meaning.unit == "%":
        text = f"{100 * value:.{meaning.digits}f}".removesuffix(".0")
    elif meaning.digits is None:
        text = f"{value:.4g}"
    else:
        text = f"{value:.{meaning.digits}f}"
        if meaning.digits == 2 and not 1 <= abs(value) < 100:
            text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"
    text = text.replace("-", MINUS)
    return f"{text}{SPACE}{meaning.unit}" if unit and meaning.unit else text


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 95 -> 1 min 35 s."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    if whole < 86400:
        return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"
    return f"{whole // 86400}{SPACE}d {whole % 86400 // 3600}{SPACE}h"
