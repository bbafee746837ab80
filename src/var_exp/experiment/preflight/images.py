"""Whether the images are what a run expects: how many, of which classes, and do they decode."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from var_exp.data import ImageSource
from var_exp.data.source import RawImage, rng_for
from var_exp.distributed.signals import ignore_signals

NUM_LOOKED_AT = 2000  # images of each part
SECONDS = 8.0  # for each part
TOGETHER = 8  # images that a worker hands over at once


class Balance(NamedTuple):
    """smallest, largest: (name of the class, its images); empty: classes without any."""

    smallest: tuple[str, int]
    largest: tuple[str, int]
    empty: list[str]


class Look(NamedTuple):
    """One image: the height and width that it has, and what is wrong with it, if anything is."""

    size: tuple[int, int] | None
    is_grey: bool
    problem: str | None


class ImageScan(NamedTuple):
    """looks: at the images that were looked at, of `total`."""

    looks: list[Look]
    total: int

    @property
    def problems(self) -> list[str]:
        return [look.problem for look in self.looks if look.problem]


def balance_of(dataset: Dataset, class_names: Sequence[str]) -> Balance | None:
    """How many images the classes have; None where there are no classes or no list of labels."""
    labels = getattr(dataset, "labels", None)
    if not class_names or labels is None:
        return None
    counts = np.bincount(np.asarray(labels), minlength=len(class_names))
    low, high = int(counts.argmin()), int(counts.argmax())
    return Balance(
        (class_names[low], int(counts[low])),
        (class_names[high], int(counts[high])),
        [class_names[i] for i in np.flatnonzero(counts == 0).tolist()],
    )


class Probe(Dataset):
    """Looks at images instead of handing them on: probe[i] -> Look."""

    def __init__(self, source: ImageSource, part: str, seed: int):
        self.source, self.part, self.seed = source, part, seed
        self.dataset = getattr(source, part)
        self.expected = (source.channels, *source.image_size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Look:
        try:
            raw, _ = self.dataset[index]
            image = self.transform(raw, index)
        except Exception as error:  # decoders raise anything
            return Look(None, False, str(error) or type(error).__name__)
        problem = None
        if tuple(image.shape) != self.expected:
            problem = f"image {index} becomes {tuple(image.shape)}, expected {self.expected}"
        size = (raw.height, raw.width) if hasattr(raw, "height") else tuple(raw.shape[-2:])
        return Look(size, bool((image == image[:1]).all()), problem)

    def transform(self, raw: RawImage, index: int) -> Tensor:
        if self.part == "train":
            return self.source.train_transform(raw, rng_for(self.seed, index))
        return self.source.val_transform(raw)


def look(
    source: ImageSource, part: str, *, seed: int, num_workers: int, everything: bool = False
) -> ImageScan:
    """Decode and cut images as training would, in an order that the seed decides.

    Args:
        part: "train" or "val".
        num_workers: processes, at most as many as there are cores.
        everything: all images, however long it takes; else `NUM_LOOKED_AT` at most, and no new
            ones after `SECONDS`.
    """
    probe = Probe(source, part, seed)
    total = len(probe)
    order = rng_for(seed).permutation(total)[: total if everything else NUM_LOOKED_AT]
    loader = DataLoader(
        probe,
        batch_size=TOGETHER,
        sampler=order.tolist(),
        num_workers=min(num_workers, os.cpu_count() or 1),
        collate_fn=list,
        worker_init_fn=ignore_signals,
    )
    looks: list[Look] = []
    end = time.monotonic() + SECONDS
    # None: hidden off a terminal.
    bar = tqdm(total=len(order), desc=f"looking at {part} images", leave=False, disable=None)
    with bar:
        for together in loader:
            looks += together
            bar.update(len(together))
            if not everything and time.monotonic() > end:
                break
    return ImageScan(looks, total)
