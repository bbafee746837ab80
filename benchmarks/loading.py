"""How fast images come from a folder, from tar shards and from parquet, on one machine.

    python -m benchmarks.loading

Writes the same JPEG files (noise smoothed to the size of photographs' files) in each form to a
temporary folder, and takes the time per image of three things, in the order that training would
read them: reading the encoded bytes alone, with the operating system's cache emptied of the files
before and without; all of loading (reading, decoding, crop, batches) in one process; and the same
in as many data workers as fit this machine, their start included. Forms take turns as
`benchmarks/harness.py` says; seconds are those of an image. Also: packing, and the index of a set
of ImageNet's size. Writes `benchmarks/results/loading.json` and prints the table.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import webdataset
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Candidate
from var_exp.data import ImageDataModule, ImageFolder, Shards
from var_exp.data.encoded import EncodedImages, EncodedSource
from var_exp.data.hugging_face import HuggingFace
from var_exp.data.pack import pack
from var_exp.data.shards.index import ROW, ShardIndex, read_index, write_index
from var_exp.data.shuffle import block_order
from var_exp.data.workers import AUTO, number_of_workers

IMAGENET = 1_281_167
BATCH, SIZE, BUFFER = 32, 256, 512
LIBRARIES = ("pillow", "datasets", "pyarrow", "webdataset")
FOLDER = "image_folder"
MAPPED = "hugging_face"  # of what is mapped into memory the system forgets nothing: no cold reads
READERS: dict[str, Callable[[EncodedImages, int], bytes]] = {  # the encoded bytes of an image
    FOLDER: lambda images, i: Path(images.paths[i]).read_bytes(),
    "shards": lambda images, i: images.files.read(
        int(images.shard[i]), int(images.offset[i]), int(images.size[i])
    ),
    MAPPED: lambda images, i: images.dataset[int(images.numbers[i])]["image"]["bytes"],
    "hugging_face, streamed": lambda images, i: images.rows_of(int(images.group[i]))[
        int(images.numbers[i] - images.groups.starts[images.group[i]])
    ].as_py()["bytes"],
}


def write_folder(root: Path, count: int) -> None:
    """JPEG files of about 400 x 350 pixels in ten classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(300, 500, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = smooth + rng.integers(-25, 26, (height, width, 3), dtype=np.int16)
        path = root / f"class_{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def write_parquet(folder: Path, root: Path) -> None:
    """The same images, in files of up to 500 rows and row groups of 100."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train").shuffle(seed=0)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    embedded = [
        {"bytes": Path(image["path"]).read_bytes(), "path": None} for image in rows["image"]
    ]
    columns = {"image": embedded, "label": rows["label"]}
    features = datasets.Features(image=datasets.Image(), label=rows.features["label"])
    whole = datasets.Dataset.from_dict(columns, features)
    root.mkdir()
    for i, first in enumerate(range(0, len(whole), 500)):
        part = whole.select(range(first, min(first + 500, len(whole)))).flatten_indices()
        pq.write_table(part.data.table, root / f"train-{i:05d}.parquet", row_group_size=100)


def sources(place: Path) -> dict[str, Callable[[], EncodedSource]]:
    size = {"image_size": SIZE}
    parquet, near = str(place / "parquet"), {"shuffle_buffer": BUFFER, "num_streams": 8}
    return {
        FOLDER: lambda: ImageFolder(str(place / "folder"), **size),
        "shards": lambda: Shards(str(place / "shards"), **size, **near),
        MAPPED: lambda: HuggingFace(parquet, **size),
        "hugging_face, streamed": lambda: HuggingFace(parquet, streamed=True, **size, **near),
    }


def opened(make: Callable[[], EncodedSource]) -> EncodedSource:
    source = make()
    source.prepare()
    source.setup()
    return source


def empty_cache(place: Path) -> None:
    """Have the operating system forget what the files hold; it may read a little ahead later."""
    for path in place.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(form: str, source: EncodedSource, count: int) -> float:
    order, read = source.order(0, 0)[:count].tolist(), READERS[form]
    began = time.perf_counter()
    for index in order:
        read(source.train, index)
    return (time.perf_counter() - began) / count


def seconds_to_load(source: EncodedSource, num_workers: int | str, count: int) -> float:
    loaders = ImageDataModule(source, num_workers=num_workers)
    loaders.plan(BATCH, max(1, count // BATCH))
    began = time.perf_counter()
    seen = sum(len(batch.images) for batch in loaders.train_dataloader())
    return (time.perf_counter() - began) / seen


def seconds_of_webdataset(shards: Path, count: int) -> float:
    """The library's own reading of whole shards, for comparison."""
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    stream = iter(webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(BUFFER))
    began = time.perf_counter()
    for _ in range(count):
        next(stream)
    return (time.perf_counter() - began) / count


def measure(place: Path, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds an image of each thing, by form; what is opened anew in each round keeps nothing."""
    made = sources(place)
    ways = {form: lambda f=form: seconds_to_read(f, opened(made[f]), count) for form in made}
    ways["webdataset's own"] = lambda: seconds_of_webdataset(place / "shards", count)

    def cold(read: Callable[[], float]) -> float:
        empty_cache(place)
        return read()

    def load(num_workers: int | str) -> dict[str, Callable[[], float]]:
        return {
            form: lambda f=form: seconds_to_load(opened(made[f]), num_workers, count // 4)
            for form in made
        }

    return {
        "read, cold cache": compare(
            {form: lambda r=read: cold(r) for form, read in ways.items() if form != MAPPED}, rounds
        ),
        "read, warm cache": compare(ways, rounds),
        "load": compare(load(0), rounds),
        "load, data workers": compare(load(AUTO), rounds),
    }


class NoLimits:
    """A processor and its memory are not what reading is measured by."""

    def measure(self) -> dict[str, float]:
        return {}


def compare(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """What the harness finds of ways that take their own times."""
    candidates = [Candidate(form, way, "uint8") for form, way in ways.items()]
    taken = harness.interleave(candidates, NoLimits(), rounds, lambda way: way())
    return {"candidates": harness.summary(candidates, taken), "rounds": taken}


def index_of_imagenet(place: Path) -> dict[str, float]:
    """What an index of as many images in shards of a gigabyte takes."""
    rows = {name: np.zeros(IMAGENET, dtype) for name, dtype in ROW.items()}
    rows["shard"] = (np.arange(IMAGENET) // 9000).astype(np.int32)
    names = tuple(f"train-{i:06d}.tar" for i in range(int(rows["shard"][-1]) + 1))
    place.mkdir()
    for name in names:
        (place / name).touch()
    write_index(place, ShardIndex(names, (0,) * len(names), ("a",), rows))
    took: dict[str, list[float]] = {"read_index": [], "order_of_an_epoch": []}
    for epoch in range(5):
        began = time.perf_counter()
        index = read_index(place)
        read = time.perf_counter()
        block_order(index.rows["shard"], shuffle_buffer=65536, num_streams=64, seed=0, epoch=epoch)
        took["read_index"].append(read - began)
        took["order_of_an_epoch"].append(time.perf_counter() - read)
    size = (place / "index.npz").stat().st_size
    return {"megabytes": size / 1e6, **{f"{k}_seconds": median(v) for k, v in took.items()}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", default=str(harness.RESULTS), help="folder of the results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        place = Path(folder)
        datasets.config.HF_DATASETS_CACHE = place / "cache"
        write_folder(place / "folder", args.count)
        began = time.perf_counter()
        pack(place / "folder", place / "shards", max_bytes=10_000_000)
        packing = (time.perf_counter() - began) / args.count
        write_parquet(place / "folder", place / "parquet")
        bytes_ = sum(path.stat().st_size for path in (place / "folder").rglob("*.jpg"))
        # A tenth is set aside to validate on.
        found = measure(place, int(0.85 * args.count), args.rounds)
        index = index_of_imagenet(place / "imagenet")
    about = harness.about(args) | {
        "libraries": {name: version(name) for name in LIBRARIES},
        "data_workers": number_of_workers(AUTO),
        "kilobytes_of_an_image": bytes_ / args.count / 1000,
        "results": found,
        "packing_milliseconds": 1000 * packing,
        "index_of_imagenet": index,
    }
    harness.save("loading", about, Path(args.results))
    print(harness.table(found))


if __name__ == "__main__":
    main()
