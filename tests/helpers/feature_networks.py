"""Feature networks that need no training: random projections of pixels."""

import math
from collections.abc import Sequence

import torch

from var_exp.evaluation import FeatureNetwork, Features


class Projection(FeatureNetwork):
    """Of colour images of one size (H, W); it counts the images it sees."""

    def __init__(self, size: Sequence[int], num_features: int = 6, seed: int = 0):
        super().__init__("projection", num_features)
        generator = torch.Generator().manual_seed(seed)
        shape = (3 * math.prod(size), num_features)
        self.weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
        self.seen = 0

    def extract(self, pixels: torch.Tensor) -> Features:
        self.seen += len(pixels)
        return Features((pixels.flatten(1).float() / 255) @ self.weight, None)


class JudgingProjection(Projection):
    """Has an opinion on classes too, for the Inception Score."""

    def extract(self, pixels: torch.Tensor) -> Features:
        features = super().extract(pixels).features
        return Features(features.tanh(), features)
