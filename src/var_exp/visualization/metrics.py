"""What figures are called, in which unit they are shown, and which way is better.

A figure's key is that of `metrics.json` without its stage, or a column of the CSV file without
`val/`: `fid_<network>`, `loss_scale_<side>`, `class_accuracy_<judge>`, with `_raw` or `_averaged`
at the end for weights that were not handed on.
"""

import math
import re
from typing import NamedTuple

STAGE_NAMES = {"tokenizer": "Tokenizer", "var": "Transformer"}
NETWORKS = {
    "classifier": "classifier features",
    "inception": "Inception",
    "dinov2": "DINOv2 features",
    "clip": "CLIP features",
}
WIDTHS = {"inception": 2048}  # features of networks, where no protocol says it
SCALE = re.compile(r"(.+)_scale_(\d+(?:x\d+)?)")
SPACE = "\u202f"  # between a number and its unit; narrow, and no line ends there
MINUS = "\u2212"

UP, DOWN = "larger", "smaller"


class Meaning(NamedTuple):
    """label: in words; unit: behind the number; better: UP, DOWN or None where neither is."""

    label: str
    unit: str = ""
    better: str | None = None
    digits: int | None = None  # after the point; None: four significant ones


KNOWN = {
    "loss": Meaning("Cross-entropy", "nats", DOWN, 3),
    "loss_last_scale": Meaning("Cross-entropy at the last scale", "nats", DOWN, 3),
    "reducible_loss": Meaning("Reducible cross-entropy", "nats", DOWN, 3),
    "reducible_loss_last_scale": Meaning(
        "Reducible cross-entropy at the last scale", "nats", DOWN, 3
    ),
    "loss_above_law": Meaning("Above the scaling law", "nats", DOWN, 3),
    "loss_above_law_last_scale": Meaning("Above the scaling law, last scale", "nats", DOWN, 3),
    "acc": Meaning("Tokens right", "%", UP, 1),
    "acc_last_scale": Meaning("Tokens right at the last scale", "%", UP, 1),
    "psnr": Meaning("PSNR", "dB", UP, 2),
    "ssim": Meaning("SSIM", "", UP, 4),
    "lpips": Meaning("LPIPS", "", DOWN, 4),
    "l1": Meaning("L1 distance", "", DOWN),
    "l2": Meaning("L2 distance", "", DOWN),
    "usage": Meaning("Codes in use", "%", UP, 1),
    "perplexity": Meaning("Perplexity of codes", "", None, 1),
    "seconds": Meaning("Training time", "s"),
}

# Prefix of a key, before the network or judge: what the figure is.
BY_NETWORK = {
    "fid": Meaning("FID", "", DOWN, 2),
    "rfid": Meaning("rFID", "", DOWN, 2),
    "kid": Meaning("KID", "", DOWN, 5),
    "inception_score": Meaning("Inception Score", "", UP, 2),
    "precision": Meaning("Precision", "", UP, 3),
    "recall": Meaning("Recall", "", UP, 3),
    "neighbour_ratio": Meaning("Distance to training images (held-out: 1)", "", None, 2),
}
BY_JUDGE = {
    "class_accuracy_real": Meaning("Real images judged right", "%", None, 1),
    "class_accuracy": Meaning("Judged right", "%", UP, 1),
}


def describe(key: str) -> Meaning:
    """What a figure is; a key that nobody knows is shown as it is, without underscores."""
    for suffix in ("_raw", "_averaged"):
        if key.endswith(suffix):
            of = describe(key.removesuffix(suffix))
            return of._replace(label=f"{of.label}, {suffix[1:]} weights")
    at_scale = SCALE.fullmatch(key)
    if at_scale:
        of = describe(at_scale[1])
        return of._replace(label=f"{of.label}, {at_or_after(at_scale[1])} {side(at_scale[2])}")
    if key in KNOWN:
        return KNOWN[key]
    kind, rest = _by_network(key)
    if kind:
        known = BY_NETWORK.get(kind) or BY_NETWORK[kind[1:]]
        of = "" if kind in BY_NETWORK else " of reconstructions"
        return known._replace(label=_in_words(known.label + of, rest))
    for prefix, meaning in BY_JUDGE.items():
        if key == prefix or key.startswith(f"{prefix}_"):
            judge = key[len(prefix) + 1 :]
            by = {"": "", "pixels": " from pixels"}.get(judge, f" by the {judge}")
            return meaning._replace(label=meaning.label + by)
    return Meaning(key.replace("_", " ").replace("/", ": "))


def at_or_after(key: str) -> str:
    """FIDs are of the image after a scale, other figures of the scale itself."""
    return "after" if key.startswith("fid") else "at"


def is_scored(key: str) -> bool:
    """Whether a figure is one of images, which depends on the protocol of its evaluation."""
    by_judge = any(key == prefix or key.startswith(f"{prefix}_") for prefix in BY_JUDGE)
    return by_judge or bool(_by_network(key)[0])


def network_of(key: str) -> str | None:
    """The feature network in a key: `fid_inception_scale_4` -> `inception`."""
    rest = _by_network(key)[1]
    known = [name for name in NETWORKS if rest == name or rest.startswith(f"{name}_")]
    return known[0] if known else rest.partition("_")[0] or None


def _by_network(key: str) -> tuple[str, str]:
    """`rkid_clip_adm` -> (`rkid`, `clip_adm`); empty for figures without a feature network.

    An r before the name says that the images are reconstructions.
    """
    for prefix in (*BY_NETWORK, *(f"r{name}" for name in BY_NETWORK)):
        if key == prefix or key.startswith(f"{prefix}_"):
            return prefix, key[len(prefix) + 1 :]
    return "", ""


def split_scale(key: str) -> tuple[str, str] | None:
    """`loss_scale_4` -> (`loss`, `4`); None for figures of all scales together."""
    found = SCALE.fullmatch(key)
    return (found[1], found[2]) if found else None


def side(name: str) -> str:
    """A scale in words: `4` -> 4×4, `4x2` -> 4×2."""
    return name.replace("x", "×") if "x" in name else f"{name}×{name}"


def show(value: float, meaning: Meaning, unit: bool = True) -> str:
    """A figure for people: rounded, with its unit, shares in percent."""
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
    """95 -> 1 min 35 s; the two largest units."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    if whole < 86400:
        return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"
    return f"{whole // 86400}{SPACE}d {whole % 86400 // 3600}{SPACE}h"


def _in_words(label: str, rest: str) -> str:
    """`FID`, `inception_adm` -> FID, Inception, crop adm."""
    if not rest:
        return label
    for name, words in NETWORKS.items():
        if rest == name or rest.startswith(f"{name}_"):
            crop = rest[len(name) + 1 :]
            return f"{label}, {words}" + (f", crop {crop}" if crop else "")
    return f"{label}, {rest} features"
