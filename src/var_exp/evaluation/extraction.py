"""Features of many images, the work shared by all processes, and their statistics.

Images are numbered, and features are in the order of the numbers, whichever process saw them.

    B batch, N images, (C, H, W) an image, F features
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics
from tqdm import tqdm

from var_exp.distributed.collectives import is_main_process, rank, world_size
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features

SEED = 0  # of the choice of images, where there are more than are asked for


def draw(count: int, limit: int | None) -> list[int]:
    """At most `limit` numbers below `count`, in order; few are a part of many."""
    return sorted(np.random.default_rng(SEED).permutation(count)[:limit].tolist())


def seen_by(
    network: FeatureNetwork, image_size: tuple[int, int], crop: str | None
) -> dict[str, Any]:
    """What features of the same images depend on, as plain data."""
    return {
        "network": network.name,
        "network_weights": network.fingerprint,
        "num_features": network.num_features,
        "image_size": list(image_size),
        "crop": crop,
    }


def features_of(
    network: FeatureNetwork,
    load: Callable[[list[int]], Tensor],
    count: int,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Features (N, F) of images 0 to count - 1, on the CPU; all processes must call.

    They share the work by whole batches, since the last bits of features may depend on the images
    beside them: so many processes give what one gives.

    Args:
        load: ascending numbers of images -> those images (B, C, H, W), as `network` takes them.
        device: where the network computes, and stays.
        on_batch: called after batches, by all processes equally often.

    Raises:
        ValueError: features that are no numbers.
    """
    network.to(device)
    bank = FeatureBank().to(device)
    batches = range(0, count, batch_size)
    starts, common = batches[rank() :: world_size()], len(batches) // world_size()
    hidden = None if is_main_process() else True  # None: where there is no terminal
    bar = tqdm(starts, desc="reading the reference", leave=False, disable=hidden)
    for batch, start in enumerate(bar):
        ids = torch.arange(start, min(start + batch_size, count))
        bank.update(Features(network(load(ids.tolist())).features, None), ids)
        if batch < common:
            on_batch()
    features = bank.compute().features
    if not features.isfinite().all():
        raise ValueError(
            f"evaluation: features of reference images, seen by {network.name}, hold nan or "
            "infinity"
        )
    return features


def statistics_of(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """mu (F,) and sigma (F, F) of features (N, F), as torch-fidelity has them, in float64.

    The sigma of one image is 0.
    """
    num_features = features.shape[1]
    if len(features) == 1:
        return features[0].double().numpy(), np.zeros((num_features, num_features))
    found = fid_features_to_statistics(features.double())
    return found["mu"], found["sigma"].reshape(num_features, num_features)
