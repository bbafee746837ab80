"""Judging images: feature networks, scores, pictures."""

from var_exp.evaluation.metrics import ScoreSettings, class_accuracy, scores, too_few
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features
from var_exp.evaluation.networks.classifier import (
    ClassifierFeatures,
    train_classifier,
    train_or_load,
)
from var_exp.visualization.images import (
    class_grid,
    coarse_to_fine,
    grid,
    reconstructions,
    save_png,
    to_uint8,
)

__all__ = [
    "ClassifierFeatures",
    "FeatureBank",
    "FeatureNetwork",
    "Features",
    "ScoreSettings",
    "class_accuracy",
    "class_grid",
    "coarse_to_fine",
    "grid",
    "reconstructions",
    "save_png",
    "scores",
    "to_uint8",
    "too_few",
    "train_classifier",
    "train_or_load",
]
