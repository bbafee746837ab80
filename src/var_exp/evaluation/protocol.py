"""How a figure was obtained, as plain data beside the figure.

Two figures compare when their protocols agree. Published ones often do not say theirs: the same
VAR checkpoint is reported with a FID of 3.6 and of 7, the same tokenizer with a reconstruction
FID of 0.9 and of 2.7.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from var_exp.evaluation.metrics import ScoreSettings
from var_exp.evaluation.networks.base import FeatureNetwork
from var_exp.evaluation.reference import Reference
from var_exp.sampling.generate import guidance_weight
from var_exp.scales import ScaleSchedule

LIBRARIES = ("torch", "torch-fidelity", "torchmetrics")
ROUNDING = "255 x rounded to the nearest whole number, clamped to 0..255"


def of_scores(
    network: FeatureNetwork, reference: Reference, settings: ScoreSettings
) -> dict[str, Any]:
    """The network, what images are compared with, and the settings of the scores."""
    return {
        "network": {
            "name": network.name,
            "weights": network.fingerprint,
            "num_features": network.num_features,
            **network.about,
        },
        "reference": reference.about,
        "scores": settings._asdict(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def of_samples(
    labels: Sequence[int],
    schedule: ScaleSchedule,
    settings: dict[str, float],
    *,
    seed: int,
    precision: str,
    weights: str,
    image_size: Sequence[int],
) -> dict[str, Any]:
    """Which samples, and how they are drawn.

    Args:
        labels: of all samples.
        schedule: of the token maps.
        settings: cfg_scale, top_k, top_p and temperature.
        precision: of the networks while they sample, such as "32-true".
        weights: "averaged" or "raw".
        image_size: (H, W) in pixels.
    """
    num_scales, counts = schedule.num_scales, Counter(labels).values()
    guidance = [guidance_weight(settings["cfg_scale"], k, num_scales) for k in range(num_scales)]
    return {
        "images": {
            "what": "samples",
            "number": len(labels),
            "per_class": sorted({min(counts), max(counts)}),
            "image_size": list(image_size),
            "uint8": ROUNDING,
        },
        "sampling": {
            **settings,
            "guidance_weight_per_scale": [round(weight, 4) for weight in guidance],
            "seed": seed,
            "precision": precision,
            "weights": weights,
        },
    }


def of_reconstructions(
    number: int, *, precision: str, weights: str, image_size: Sequence[int], crop: str | None
) -> dict[str, Any]:
    """Which reconstructions.

    Args:
        number: of images.
        crop: how images are cut to their size, "var" or "adm"; None where they have it already.
    """
    return {
        "images": {
            "what": "reconstructions of validation images",
            "number": number,
            "crop": crop,
            "image_size": list(image_size),
            "uint8": ROUNDING,
        },
        "tokenizer": {"precision": precision, "weights": weights},
    }
