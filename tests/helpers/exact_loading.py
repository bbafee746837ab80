"""What every source of training images must keep, and images to keep it with."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from var_exp.data import ImageDataModule, ImageSource

BATCH, NUM_BATCHES = 6, 11  # more than two epochs of the 27 images to train on


def write_images(root: Path, classes=("ant", "bee", "cow"), count: int = 10) -> Path:
    """A folder of noise, so that no image is like another: 20 pixels high, of several widths."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 20 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def loaders(
    source: ImageSource, rank: int = 0, world_size: int = 1, num_workers: int = 0, start: int = 0
) -> ImageDataModule:
    source.prepare()
    source.setup()
    made = ImageDataModule(source, seed=3, num_workers=num_workers, val_batch_size=2)
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    made.plan(BATCH, NUM_BATCHES)
    made.start_batch = start
    return made


def batches(source: ImageSource, **options) -> list[list[tuple[bytes, int, int]]]:
    """(image bytes, label, index) of each image of each batch in order."""
    return [
        [
            (image.numpy().tobytes(), label.item(), index.item())
            for image, label, index in zip(*batch, strict=True)
        ]
        for batch in loaders(source, **options).train_dataloader()
    ]


def check_restarts(make: Callable[[], ImageSource], starts=range(NUM_BATCHES)) -> None:
    """A run that goes on at any batch sees what the uninterrupted one would have seen."""
    whole = batches(make())
    for start in starts:
        assert batches(make(), start=start) == whole[start:]


def check_ranks(make: Callable[[], ImageSource]) -> None:
    """Two and three ranks together see the batches of one process, in training and validation."""
    alone = batches(make())
    for world_size in (2, 3):
        ranks = [batches(make(), rank=r, world_size=world_size) for r in range(world_size)]
        for batch, *shares in zip(alone, *ranks, strict=True):
            assert [row for rows in zip(*shares, strict=True) for row in rows] == batch
        val = [
            batch.indices
            for rank in range(world_size)
            for batch in loaders(make(), rank=rank, world_size=world_size).val_dataloader()
        ]
        found = sorted(np.concatenate(val).tolist())
        assert found == list(range(len(loaders(make()).source.val)))


def check_workers(make: Callable[[], ImageSource]) -> None:
    """Two data workers load what the training process would, from the start and from later on."""
    for start in (0, 5):
        assert batches(make(), num_workers=2, start=start) == batches(make(), start=start)


def check_epochs(source: ImageSource) -> None:
    """Each epoch shows each image once, in another order."""
    rows = [row for batch in batches(source) for row in batch]
    size = len(source.train)
    first, second = ([index for _, _, index in rows[e * size : (e + 1) * size]] for e in (0, 1))
    assert Counter(first) == Counter(second) == Counter(range(size))
    assert first != second and first != sorted(first)
    augmented = [{pixels for pixels, _, _ in rows[e * size : (e + 1) * size]} for e in (0, 1)]
    assert len(augmented[0] - augmented[1]) > size / 2, "another crop in each epoch"


def pixels_and_labels(part) -> Counter:
    """Every image of a part with its label, whatever their order."""
    return Counter(
        (np.asarray(image).tobytes(), label)
        for image, label in map(part.__getitem__, range(len(part)))
    )
