"""Packs an image folder into tar shards, indexes shards that are there, checks them.

    python -m var_exp.data.pack FOLDER OUT    classes and parts are those of data=image_folder
    python -m var_exp.data.pack OUT --index   write the index of shards that were made elsewhere
    python -m var_exp.data.pack OUT --check   read everything again; exit code 1 if it is not whole

A shard has its final name only when it is whole; the same command goes on where it was stopped.
"""

import argparse
import io
import json
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from var_exp.data.encoded import ON_BAD_IMAGE, decode
from var_exp.data.image_folder import ImageFolder
from var_exp.data.shards.index import (
    CLASSES,
    find_shards,
    make_index,
    read_index,
    scan_shard,
    write_index,
)
from var_exp.data.shards.writer import BadImages, begin, plan, write_shard
from var_exp.io.files import atomic_write
from var_exp.io.parts import in_processes

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def pack(
    folder: Path,
    out: Path,
    max_bytes: int = 10**9,
    workers: int = 0,
    on_bad_image: str = "raise",
    val_fraction: float = 0.1,
    seed: int = 0,
) -> BadImages:
    """Packs a folder; the files that were left out because they do not decode.

    Args:
        max_bytes: of a shard.
        workers: processes; 0 for none besides this one.
        on_bad_image: "raise", or "skip" to leave them out.
        val_fraction: share of each class to validate on, where the folder has no val/.
        seed: of that choice, and of the order in the shards.

    Raises:
        ValueError: the folder makes no set of images, `out` holds other shards, or an image does
            not decode and they are not skipped: all of them are named, and shards without them
            are kept.
    """
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is not a folder of images")
    source = ImageFolder(str(folder), name="pack", val_fraction=val_fraction, seed=seed)
    source.setup()
    jobs = plan(source, out, max_bytes, seed)
    skip = on_bad_image == "skip"
    options = {"max_bytes": max_bytes, "on_bad_image": on_bad_image, "seed": seed}
    parts = begin(out, jobs, options)
    written = in_processes(write_shard, [(job, skip, parts) for job in jobs], workers, "shard")
    bad = [entry for result in written for entry in result.bad]
    if any(result.scanned is None for result in written):
        tell(bad)
        total = len(source.train) + len(source.val)
        raise ValueError(
            f"{len(bad)} of {total} images do not decode, the first is '{bad[0][0]}' "
            f"({bad[0][1]}): remove them, or leave them out by --on-bad-image skip"
        )
    if source.class_names:
        with atomic_write(out / CLASSES) as unfinished:
            unfinished.write_text(json.dumps(list(source.class_names)) + "\n")
    names = [job.path.name for job in jobs]
    parts.finish(names)
    write_index(out, make_index(out, names, [result.scanned for result in written]))
    return bad


def index_shards(root: Path, workers: int = 0) -> None:
    """Writes the index of the shards under a folder, which it reads once.

    Raises:
        ValueError: there are none, or one is damaged or holds no samples as ours.
    """
    names = find_shards(root)
    if not names:
        raise ValueError(f"no *.tar under '{root}', expected shards to index")
    scanned = in_processes(scan_shard, [(root / name,) for name in names], workers, "shard")
    write_index(root, make_index(root, names, scanned))


def check_shards(root: Path, workers: int = 0) -> BadImages:
    """What is wrong: shards that are not as indexed, and images that do not decode.

    Raises:
        ValueError: as `read_index`.
    """
    index = read_index(root)
    jobs = []
    for number, shard in enumerate(index.shards):
        here = index.rows["shard"] == number
        jobs.append((root / shard, {name: row[here] for name, row in index.rows.items()}))
    found = in_processes(check_shard, jobs, workers, "shard")
    strangers = sorted(set(find_shards(root)) - set(index.shards))
    return [(str(root / name), "not in the index") for name in strangers] + sum(found, [])


def check_shard(path: Path, rows: dict[str, np.ndarray]) -> BadImages:
    try:
        scanned = scan_shard(path).rows
    except ValueError as error:
        return [(str(path), str(error))]
    scanned["label"] = np.maximum(scanned["label"], 0)
    bad = [
        (str(path), f"not as it was indexed: another {name}")
        for name in scanned
        if not np.array_equal(scanned[name], rows[name])
    ]
    with open(path, "rb") as file:
        for offset, size in zip(scanned["offset"].tolist(), scanned["size"].tolist(), strict=True):
            file.seek(offset)
            try:
                decode(io.BytesIO(file.read(size)), str(path), "RGB")
            except ValueError as error:
                bad.append((f"{path}, byte {offset}", str(error.__cause__)))
    return bad


def tell(bad: BadImages) -> None:
    for name, reason in bad:
        print(f"bad: {name} ({reason})", file=sys.stderr)


def summary(root: Path) -> str:
    index = read_index(root)
    parts = {part or "no part": len(index.part(part)) for part in ("train", "val", "test", "")}
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items() if count)
    return (
        f"'{root}': {len(index.rows['label']):,} images ({counts}) of {len(index.class_names)} "
        f"classes in {len(index.shards)} shards, {sum(index.sizes) / 1e9:.3g} GB"
    )


def bytes_of(text: str) -> int:
    """ "500M" -> 500,000,000; K, M and G are thousands, millions, billions of bytes."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    number = int(match[1]) * UNITS[match[2]] if match else 0
    if number < tarfile.RECORDSIZE:
        raise ValueError(
            f"--max-size is {text!r}, expected at least {tarfile.RECORDSIZE} bytes, such as 500M "
            "or 1G"
        )
    return number


def main(arguments: Sequence[str]) -> str:
    """Do what the arguments ask for, and say what is there now.

    Raises:
        ValueError: as `pack`, `index_shards`, `check_shards`, or something is wrong.
    """
    parser = argparse.ArgumentParser("python -m var_exp.data.pack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="images to pack; or shards, without OUT")
    add("out", type=Path, metavar="OUT", nargs="?", help="where shards go")
    add("--max-size", default="1G", help="of a shard: bytes, or such as 500M (default: 1G)")
    add("--workers", type=int, default=0, help="processes; 0 for none besides this one")
    add("--on-bad-image", choices=ON_BAD_IMAGE, default="raise", help="skip: leave such files out")
    add("--val-fraction", type=float, default=0.1, help="where there is no val/ (default: 0.1)")
    add("--seed", type=int, default=0, help="of that choice and of the order in the shards")
    add("--index", action="store_true", help="write the index of shards that are there")
    add("--check", action="store_true", help="read all shards again: counts, checksums, decoding")
    given = parser.parse_args(arguments)
    if given.workers < 0:
        raise ValueError(f"--workers is {given.workers}, expected 0 or more")
    if given.out is None and not (given.index or given.check):
        raise ValueError(
            f"nothing to do with '{given.folder}': name OUT, or say --index or --check"
        )
    root = given.out or given.folder
    if given.out is not None:
        options = (bytes_of(given.max_size), given.workers, given.on_bad_image)
        tell(pack(given.folder, root, *options, given.val_fraction, given.seed))
    elif given.index:
        index_shards(root, given.workers)
    if given.check:
        bad = check_shards(root, given.workers)
        tell(bad)
        if bad:
            raise ValueError(f"{len(bad)} things are wrong under '{root}', named above")
    return summary(root)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
