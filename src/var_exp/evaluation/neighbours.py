"""Nearest training images: are samples new, or copies of what the model was trained on?

A model that has learned its training images by heart has a perfect FID against them. So samples
are put beside their nearest training images in feature space, and their distance to these is
compared with the distance of real images that the model never saw: a test of three samples,
generated, training and held-out, as Meehan, Chaudhuri and Dasgupta propose (arXiv 2004.05675).
Theirs ranks the distances in each cell of a partition; here it is one ratio of medians.

    N samples, M reference images, F features, k neighbours, (C, H, W) an image
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from var_exp.visualization.images import captioned

ROWS = 1000  #  samples whose distances are held at once,
COLUMNS = 4096  # to so many reference images


def nearest(features: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a reference, by Euclidean distance, the nearest first.

    Distances are taken in float64, those that are returned from differences: that of a copy is
    exactly 0. Memory beyond the arguments and results is bounded.

    Args:
        features: (N, F) float32, on the CPU.
        reference: (M, F).

    Returns:
        distances (N, k) float64 and rows (N, k) int64, numbers of rows of the reference.

    Raises:
        ValueError: features of different lengths, or fewer than k in the reference.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"evaluation: expected features (N, F) and (M, F), got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}"
        )
    if not 1 <= k <= len(reference):
        raise ValueError(
            f"evaluation: expected 1 to {len(reference)} neighbours, as many as there are "
            f"reference images, got {k}"
        )
    found = [_nearest(part.double(), reference, k) for part in features.split(ROWS)]
    distances, rows = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(rows)


def _nearest(features: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` of a few features (n, F) in float64."""
    best = features.new_empty(len(features), 0)  #               (n, up to k)
    rows = best.long()
    for start, part in _parts(reference):
        numbers = torch.arange(start, start + len(part)).expand(len(features), -1)
        best = torch.cat([best, torch.cdist(features, part)], 1)
        rows = torch.cat([rows, numbers], 1)
        best, chosen = best.topk(min(k, best.shape[1]), largest=False)
        rows = rows.gather(1, chosen)  #                         (n, up to k)
    # A matrix product found them, whose rounding is that of the features' lengths.
    differences = features.unsqueeze(1) - reference[rows]  #     (n, k, F)
    distances, order = differences.norm(dim=2).sort(dim=1, stable=True)
    return distances, rows.gather(1, order)


def _parts(reference: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(reference), COLUMNS):
        yield start, reference[start : start + COLUMNS].double()


def neighbour_ratio(samples: Tensor, reference: Tensor, held_out: Tensor) -> float:
    """How far samples are from training images, where 1 is as far as unseen real images.

    The median distance of samples to their nearest training image over that of held-out images.
    Far below 1, samples are copies; far above, they are unlike the training images.

    Args:
        samples: (N, F) features.
        reference: (M, F), of training images.
        held_out: (n, F), of real images that are no training images.

    Returns:
        The ratio; nan where most held-out images are training images too, or there are none.
    """
    far, unseen = (
        nearest(features, reference, 1)[0].median().item() for features in (samples, held_out)
    )
    return far / unseen if unseen > 0 else float("nan")


def neighbours_picture(samples: Tensor, neighbours: Tensor, distances: Tensor) -> np.ndarray:
    """A row per sample: the sample, then its nearest training images with their distances.

    Args:
        samples: (N, C, H, W) in [0, 1].
        neighbours: (N, k, C, H, W) in [0, 1], the nearest first.
        distances: (N, k).

    Returns:
        uint8 (H, W, 3).
    """
    if neighbours.shape[:2] != distances.shape or len(neighbours) != len(samples):
        raise ValueError(
            f"pictures: expected neighbours (N, k, C, H, W) and distances (N, k) of "
            f"{len(samples)} samples, got {tuple(neighbours.shape)} and {tuple(distances.shape)}"
        )
    rows = torch.cat([samples.unsqueeze(1).cpu(), neighbours.cpu()], dim=1)  # (N, 1 + k, C, H, W)
    captions = [["", *(f"{distance:.2f}" for distance in row)] for row in distances.tolist()]
    names = ["sample", "nearest", *(f"{i}." for i in range(2, distances.shape[1] + 1))]
    return captioned(rows, captions, names)
