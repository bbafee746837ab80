"""Small sets of images in parquet files."""

import io

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

FEATURES = datasets.Features(
    image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cow"])
)


def table(first: int, count: int) -> datasets.Dataset:
    """Images of noise, each unlike all others, with labels in turn."""
    images, labels = [], []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "png")
        images.append({"bytes": held.getvalue(), "path": None})
        labels.append(number % 3)
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=FEATURES)


def write_parquet(root, parts: dict[str, int], rows_of_group: int = 4, change=lambda d: d):
    """Parquet files of ten rows each, in small row groups."""
    root.mkdir(parents=True, exist_ok=True)
    first = 0
    for split, count in parts.items():
        for i in range(0, count, 10):
            rows = change(table(first + i, min(10, count - i)))
            path = root / f"{split}-{i // 10:05d}.parquet"
            pq.write_table(rows.data.table, path, row_group_size=rows_of_group)
        first += count
    return root
