"""An image folder as tar shards: what goes into which shard, and how one is written.

What is written follows from the files and the options alone: images are shuffled by the seed, so
that a shard is a sample of all classes, and tar headers carry no time and no owner. So each shard
can be written by another process, or not at all where it is there already, and the same folder
gives the same bytes.
"""

import hashlib
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from var_exp.data.encoded import decode
from var_exp.data.image_folder import ImageFiles, ImageFolder
from var_exp.data.shards.index import Scanned, find_shards, scan_shard
from var_exp.data.source import epoch_order
from var_exp.io.parts import Parts

RECORD = "packing.json"
NAMES = re.compile(r"(train|val)-\d{6,}\.tar")
REMEDY = "choose another folder, or remove that one"
BadImages = list[tuple[str, str]]  # which do not decode, and why


class Sample(NamedTuple):
    """key: name in the shard; label: None for a set without classes; stamp: size and time."""

    key: str
    path: str
    label: int | None
    stamp: tuple[int, int]

    @property
    def name(self) -> str:
        return self.key + os.path.splitext(self.path)[1].lower()


class ShardJob(NamedTuple):
    """A shard to be: its final path, and its samples in order."""

    path: Path
    samples: list[Sample]


class Written(NamedTuple):
    """scanned: None where the shard was refused, because of images that are bad."""

    scanned: Scanned | None
    bad: BadImages


def plan(source: ImageFolder, out: Path, max_bytes: int, seed: int) -> list[ShardJob]:
    """Deals the images of both parts of a folder out to shards of at most so many bytes.

    An image that is larger than a shard may be gets one of its own.
    """
    # Archives end with two empty blocks and are filled up to whole records.
    room = max_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE
    jobs: list[ShardJob] = []
    taken: set[str] = set()
    for part in ("train", "val"):
        files = getattr(source, part)
        samples = list(samples_of(files, source.root, bool(source.class_names), taken))
        piles: list[list[Sample]] = []
        size = room
        for number in epoch_order(len(samples), seed, epoch=0):
            added = bytes_in_tar(samples[number])
            if size + added > room:
                piles.append([])
                size = 0
            piles[-1].append(samples[number])
            size += added
        jobs += [ShardJob(out / f"{part}-{i:06d}.tar", pile) for i, pile in enumerate(piles)]
    return jobs


def samples_of(files: ImageFiles, root: str, labelled: bool, taken: set[str]) -> Iterator[Sample]:
    """Keys are paths below the folder without extension; those that are taken get a number."""
    for path, label in zip(files.paths, files.labels, strict=True):
        folder, _, base = os.path.relpath(path, root).replace(os.sep, "/").rpartition("/")
        stem = os.path.splitext(base)[0].replace(".", "_")  # the key ends at the first dot
        wanted = key = f"{folder}/{stem}" if folder else stem
        number = 2
        while key in taken:
            key, number = f"{wanted}_{number}", number + 1
        taken.add(key)
        stat = os.stat(path)
        yield Sample(key, path, label if labelled else None, (stat.st_size, stat.st_mtime_ns))


def bytes_in_tar(sample: Sample) -> int:
    """At most so many: a header and whole blocks for the image, as much for the label."""
    blocks = 1 + -(-sample.stamp[0] // tarfile.BLOCKSIZE) + (2 if sample.label is not None else 0)
    if len(sample.name) > 100 or not sample.name.isascii():
        blocks += 6  # longer headers, of both files
    return blocks * tarfile.BLOCKSIZE


def begin(out: Path, jobs: Sequence[ShardJob], options: dict) -> Parts:
    """Record in the folder what is being packed, so that only the same goes on in it.

    Raises:
        ValueError: the folder holds other shards.
    """
    digest = hashlib.sha256()
    for job in jobs:
        for sample in job.samples:
            digest.update(repr((sample.name, sample.label, sample.stamp)).encode())
    parts = Parts(
        out, RECORD, {"options": options, "files": digest.hexdigest()}, NAMES, "pack", REMEDY
    )
    record, shards = parts.read_record(), set(find_shards(out))
    known = record and {name: record.get(name) for name in parts.work}
    if (known != parts.work and shards) or shards - {job.path.name for job in jobs}:
        same = known and known["files"] == parts.work["files"]
        raise ValueError(
            f"'{out}' holds shards of other {'options' if same else 'images'} than these: {REMEDY}"
        )
    parts.begin()
    return parts


def write_shard(job: ShardJob, skip: bool, parts: Parts) -> Written:
    """Write a shard, unless it is there and whole, of the images that decode.

    Args:
        skip: leave out images that do not decode; else nothing is written where there is one.
    """
    if parts.is_whole(job.path.name, lambda line: print(line, file=sys.stderr)):
        scanned = scan_shard(job.path)
        if len(scanned.rows["label"]) == len(job.samples):
            return Written(scanned, [])
        with tarfile.open(job.path) as tar:
            names = set(tar.getnames())
        missing = [sample.path for sample in job.samples if sample.name not in names]
        return Written(scanned, [(path, "left out before") for path in missing])
    bad: BadImages = []

    def write(path: Path) -> None:
        bad.extend(write_tar(path, job.samples))
        if bad and not skip:
            raise Refused

    try:
        parts.write(job.path.name, write)
    except Refused:
        return Written(None, bad)
    return Written(scan_shard(job.path), bad)


class Refused(Exception):
    """A shard is not to be, because of files that do not decode."""


def write_tar(path: Path, samples: Sequence[Sample]) -> BadImages:
    """Write a tar file of the samples that decode; the others."""
    bad: BadImages = []
    with tarfile.open(path, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            data = Path(sample.path).read_bytes()
            try:
                decode(io.BytesIO(data), sample.path, "RGB")
            except ValueError as error:
                bad.append((sample.path, str(error.__cause__)))
            else:
                add(tar, sample.name, data)
                if sample.label is not None:
                    add(tar, f"{sample.key}.cls", str(sample.label).encode())
    return bad


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)  # of the year 1970, nobody's
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
