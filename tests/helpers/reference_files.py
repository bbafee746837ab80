"""References that tests write into files: images, statistics, and one as training makes it."""

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from var_exp.evaluation.reference import Reference

NUM_FEATURES, NUM_IMAGES, SIZE = 6, 30, (8, 10)


def images(count=NUM_IMAGES, size=SIZE, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def statistics(num_features=NUM_FEATURES, dtype=np.float64):
    features = torch.randn(100, num_features, dtype=torch.float64)
    return {key: x.astype(dtype) for key, x in fid_features_to_statistics(features).items()}


def of_ours(network, about=()):
    """A reference as it is made of a source's images."""
    features = torch.randn(NUM_IMAGES, NUM_FEATURES)
    about = {
        "what": "digits train",
        "network": network.name,
        "network_weights": network.fingerprint,
        "num_features": NUM_FEATURES,
        "image_size": list(SIZE),
        "crop": None,
        **dict(about),
    }
    statistics = fid_features_to_statistics(features.double())
    indices = list(range(0, 2 * NUM_IMAGES, 2))
    return Reference(**statistics, num_images=50, features=features, indices=indices, about=about)
