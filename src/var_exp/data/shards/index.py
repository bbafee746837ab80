"""Where each image lies in a folder of tar shards: one small file, so that any image can be read.

Shards are what the `webdataset` library reads and writes: tar files in which consecutive files
with the same name up to the first dot make up a sample, `n01440764/n01440764_10026.jpg` and
`.cls`. A tar file has no table of contents, so without an index it is read from its start.

    root/train-000000.tar ... root/val-000000.tar ...   any names, in folders below too
    root/classes.json                                   the names of the classes, if they have some
    root/index.npz                                      this index

Labels are whole numbers, in `key.cls`, or in `key.json` under "label" or "cls". A shard with the
word val (valid, validation) in its name is one to validate on, one with train is one to train on,
one with test is left alone; where no name says so, a share of the images is set aside.

The index takes 24 bytes an image, 31 MB for ImageNet.

Letters: N images, S shards.
"""

import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from var_exp.data.image_folder import EXTENSIONS
from var_exp.io import npz
from var_exp.io.files import atomic_write

INDEX, CLASSES = "index.npz", "classes.json"
FORMAT = 1
PARTS = {"val": "val", "valid": "val", "validation": "val", "train": "train", "test": "test"}
# One row for each image; `shard` counts the shards of the index.
ROW = {
    "shard": np.int32,
    "offset": np.int64,  # of the image's first byte
    "size": np.int32,  # bytes
    "label": np.int32,
    "checksum": np.uint32,  # zlib.crc32 of the encoded image
}
NO_LABEL = -1


class ShardIndex(NamedTuple):
    """shards: paths under the root; sizes: (S,) bytes; class_names; rows: (N,) of each `ROW`."""

    shards: tuple[str, ...]
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]
    rows: dict[str, np.ndarray]

    def part(self, name: str) -> np.ndarray:
        """The numbers of the images in shards that are for "train", "val", "test" or "" (any)."""
        of_shard = np.array([part_of(shard) == name for shard in self.shards], dtype=bool)
        return np.flatnonzero(of_shard[self.rows["shard"]])


class Scanned(NamedTuple):
    """What one shard holds: its bytes, and (n,) of each `ROW` but the shard."""

    size: int
    rows: dict[str, np.ndarray]


def find_shards(root: Path) -> list[str]:
    """The tar files in a folder and below it, sorted; hidden ones are left out."""
    found = [path.relative_to(root) for path in root.rglob("*.tar") if path.is_file()]
    return sorted(p.as_posix() for p in found if not any(s.startswith(".") for s in p.parts))


def part_of(shard: str) -> str:
    """ "train", "val", "test", or "" where the name does not say."""
    words = re.findall("[a-z]+", shard.lower())
    return next((PARTS[word] for word in words if word in PARTS), "")


def scan_shard(path: Path) -> Scanned:
    """Reads a shard from its start to its end.

    Raises:
        ValueError: it is cut short, damaged or no tar file, or a sample is none of ours.
    """
    found: dict[str, list[int]] = {name: [] for name in ROW if name != "shard"}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = ((split_name(m.name), m) for m in tar if m.isfile())
            for key, sample in groupby(members, key=lambda item: item[0][0]):
                image, label = read_sample(tar, key, {ext: m for (_, ext), m in sample})
                data = read_member(tar, image)
                row = (image.offset_data, image.size, label, zlib.crc32(data))
                for values, value in zip(found.values(), row, strict=True):
                    values.append(value)
            file.seek(tar.offset)
            # tarfile takes a damaged header, and a file that ends early, for the end.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"no tar header and no end at byte {tar.offset}")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"shard '{path}' is cut short, damaged, or holds no samples ({error}): make or copy "
            "it again"
        ) from None
    rows = {name: np.array(values, dtype=ROW[name]) for name, values in found.items()}
    return Scanned(path.stat().st_size, rows)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # like anything that is not a file
    return file.read()


def split_name(name: str) -> tuple[str, str]:
    """A file's name -> (key, extension with its dot), split at the first dot as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def read_sample(
    tar: tarfile.TarFile, key: str, files: dict[str, tarfile.TarInfo]
) -> tuple[tarfile.TarInfo, int]:
    """A sample's files by extension -> (its image, its label or `NO_LABEL`)."""
    images = [member for extension, member in files.items() if extension in EXTENSIONS]
    if len(images) != 1:
        raise ValueError(
            f"the sample '{key}' has {len(images)} images among {' '.join(files)}, expected one"
        )
    label = None
    if ".cls" in files:
        label = read_member(tar, files[".cls"]).decode()
    elif ".json" in files:
        about = json.loads(read_member(tar, files[".json"]))
        label = about.get("label", about.get("cls")) if isinstance(about, dict) else None
    if label is None:
        return images[0], NO_LABEL
    if not re.fullmatch(r"\d+", str(label).strip()):
        raise ValueError(f"the sample '{key}' has the label {label!r}, expected a whole number")
    return images[0], int(label)


def make_index(root: Path, shards: Sequence[str], scanned: Sequence[Scanned]) -> ShardIndex:
    """Puts shards together.

    Raises:
        ValueError: no images, or labels that do not go together or with classes.json.
    """
    rows = {
        name: np.concatenate([s.rows[name] for s in scanned]) for name in ROW if name != "shard"
    }
    counts = [len(s.rows["label"]) for s in scanned]
    rows["shard"] = np.repeat(np.arange(len(scanned)), counts).astype(ROW["shard"])
    labels = rows["label"]
    if not len(labels):
        raise ValueError(f"the shards under '{root}' hold no images")
    names = read_class_names(root / CLASSES)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest == NO_LABEL and (highest != NO_LABEL or names):
        raise ValueError(
            f"{np.sum(labels == NO_LABEL)} of {len(labels)} images under '{root}' have no label "
            f'(key.cls, or "label" in key.json), expected all of them to have one, or none and no '
            f"{CLASSES}"
        )
    if names and highest >= len(names):
        raise ValueError(
            f"an image under '{root}' has the label {highest}, but {CLASSES} names {len(names)} "
            "classes"
        )
    rows["label"] = np.maximum(labels, 0)
    names = names or tuple(str(number) for number in range(highest + 1))
    return ShardIndex(tuple(shards), tuple(s.size for s in scanned), names, rows)


def read_class_names(path: Path) -> tuple[str, ...]:
    """The list of names in a JSON file; none where there is no such file."""
    if not path.exists():
        return ()
    try:
        names = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'\'{path}\' is no list of names, expected such as ["ant", "bee"]')
    return tuple(names)


def write_index(root: Path, index: ShardIndex) -> None:
    about = {"format": FORMAT, **{k: v for k, v in index._asdict().items() if k != "rows"}}
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with atomic_write(root / INDEX) as unfinished:
        npz.write(unfinished, {"about": text, **index.rows})


def read_index(root: Path) -> ShardIndex:
    """The index of a folder, whose shards are there and as long as when they were indexed.

    Raises:
        ValueError: it is missing or damaged, or is not that of the shards.
    """
    path, remedy = root / INDEX, f"python -m var_exp.data.pack {root} --index"
    if not path.is_file():
        raise ValueError(f"'{path}' is missing: {remedy} writes it (data.root=DIR)")
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            rows = {name: stored[name] for name in ROW}
        parts = (tuple(about[name]) for name in ("shards", "sizes", "class_names"))
        shards, sizes, class_names = parts
        index = ShardIndex(shards, sizes, class_names, rows)
        whole = about["format"] == FORMAT and len({len(row) for row in rows.values()}) == 1
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{path}' is damaged ({reason}): {remedy} writes it again") from None
    if not whole:
        raise ValueError(f"'{path}' is of another format: {remedy} writes it again")
    for shard, size in zip(index.shards, index.sizes, strict=True):
        there = root / shard
        found = there.stat().st_size if there.is_file() else None
        if found != size:
            raise ValueError(
                f"shard '{there}' {'is missing' if found is None else f'has {found:,} bytes'}, "
                f"expected {size:,}: copy it again, or, if it was changed on purpose, {remedy}"
            )
    return index
