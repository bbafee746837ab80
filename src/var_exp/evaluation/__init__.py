"""Judging images: feature networks, scores, pictures."""

from var_exp.evaluation.features import (
    ClassifierFeatures,
    FeatureNetwork,
    Features,
    train_classifier,
    train_or_load,
)
from var_exp.evaluation.fidelity import Fidelity, class_accuracy
from var_exp.evaluation.pictures import (
    class_grid,
    coarse_to_fine,
    grid,
    reconstructions,
    save_png,
    to_uint8,
)

__all__ = [
    "ClassifierFeatures",
    "FeatureNetwork",
    "Features",
    "Fidelity",
    "class_accuracy",
    "class_grid",
    "coarse_to_fine",
    "grid",
    "reconstructions",
    "save_png",
    "to_uint8",
    "train_classifier",
    "train_or_load",
]
