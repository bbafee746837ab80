"""What generated images are compared with: statistics and features of a source's images.

They are computed once and kept in a file for other runs. Its name is made of all that they depend
on, so that a file of other images, or of another network, is never taken for it.

    B batch, N images, (C, H, W) an image, F features
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from var_exp.distributed.collectives import barrier, is_distributed, is_main_process
from var_exp.evaluation.extraction import draw, features_of, seen_by, statistics_of
from var_exp.evaluation.networks.base import FeatureNetwork
from var_exp.evaluation.reference_file import (
    Reference,
    load_reference,
    reference_from_file,
    save_reference,
)
from var_exp.io.npz import NpzError
from var_exp.visualization.images import to_uint8

__all__ = [
    "Reference",
    "data_fingerprint",
    "reference_from_file",
    "reference_of",
    "save_reference",
]

VERSION = 1  #         of what a kept reference holds; part of its name
NUM_LOOKED_AT = 64  #  images that tell one data set from another


@torch.inference_mode(False)
def reference_of(
    network: FeatureNetwork,
    source: Any,
    part: str,
    limit: int | None = None,
    batch_size: int = 100,
    cache: str | Path | None = None,
    device: torch.device | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Reference:
    """The reference of a source's images, from the cache where it was made before.

    All processes must call; they share the work, and all get the same reference, to the bit that
    of one process.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up.
        part: "train" or "val".
        limit: how many images at most, drawn evenly; None for all.
        batch_size: images that the network sees at once.
        cache: a folder; a file in it that is damaged is made again. None keeps nothing.
        device: where the network computes, and stays; None for where it is.
        on_batch: see `features_of`.

    Raises:
        ValueError: no images, a limit below 1, or features that are no numbers.
    """
    assert part in ("train", "val"), part
    dataset = getattr(source, part)
    if len(dataset) == 0 or (limit is not None and limit < 1):
        asked = "all" if limit is None else limit
        raise ValueError(
            f"evaluation: expected a reference of at least 1 image, got {asked} of {len(dataset)} "
            f"{part} images of {source.name} (evaluation.num_reference)"
        )
    chosen = draw(len(dataset), limit)
    about = {
        "what": f"{source.name} {part}",
        "num_images": len(chosen),
        "hash": data_fingerprint(source, part),
        **seen_by(network, source.image_size, source.crop),
    }
    device = network.device if device is None else torch.device(device)
    path = Path(cache) / f"{_key(about)}.npz" if cache else None
    kept = None if path is None else _kept(path, about)
    if _everyone(kept is not None, device) and kept is not None:
        return kept

    def load(numbers: list[int]) -> Tensor:
        images = [source.val_transform(dataset[chosen[i]][0]) for i in numbers]
        return torch.stack(images).add(1).div(2)  # (B, C, H, W)

    features = features_of(network, load, len(chosen), batch_size, device, on_batch)
    found = Reference(*statistics_of(features), len(chosen), features, chosen, about)
    if path is not None:
        _keep(found, path)
    return found


def data_fingerprint(source: Any, part: str) -> str:
    """16 hexadecimal digits that tell a part of a source from others.

    A hash of its name, image size, channels, class names, crop, number of images, and of the
    pixels of 64 of them, evenly spaced, after `val_transform`.
    """
    dataset = getattr(source, part)
    facts = {
        "name": source.name,
        "image_size": list(source.image_size),
        "channels": source.channels,
        "class_names": list(source.class_names),
        "crop": source.crop,
        "num_images": len(dataset),
    }
    digest = hashlib.sha256(json.dumps(facts).encode())
    for i in np.linspace(0, len(dataset) - 1, min(NUM_LOOKED_AT, len(dataset))).round():
        image = source.val_transform(dataset[int(i)][0])  # (C, H, W)
        digest.update(to_uint8((image + 1) / 2).numpy().tobytes())
    return digest.hexdigest()[:16]


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, about], sort_keys=True).encode()).hexdigest()[:16]


def _everyone(holds: bool, device: torch.device) -> bool:
    """Whether something holds in every process: one alone would wait for the others forever."""
    if not is_distributed():
        return holds
    votes = torch.tensor(int(holds), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def _kept(path: Path, about: dict[str, Any]) -> Reference | None:
    """The reference in a file; None, with a warning, where the file cannot be believed."""
    if not path.exists():
        return None
    try:
        found = load_reference(path)
        if found.about == about:
            return found
        reason = "is of something else"
    except NpzError as error:
        reason = str(error)
    _warn(f"evaluation: {path} {reason}; it is made again")
    return None


def _keep(reference: Reference, path: Path) -> None:
    """One process writes; the others wait, as they may read the next time."""
    if is_main_process():
        try:
            save_reference(reference, path)
        except OSError as error:  # a full disk is no reason to end a training
            _warn(f"evaluation: {path} is not kept for other runs ({error.strerror})")
    barrier()


def _warn(message: str) -> None:
    if is_main_process():
        warnings.warn(message, stacklevel=4)
