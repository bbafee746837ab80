"""PNG files and arrays of many samples: verified when read, never all in memory.

N samples, n of a run of them, (H, W, C) an image
"""

import functools
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from var_exp.io import npz
from var_exp.io.files import atomic_write
from var_exp.io.npz import NpzError

THREADS = min(8, os.cpu_count() or 1)  # that write and read PNG files


def in_threads(function: Callable[[int], Any], ids: Sequence[int]) -> list[Any]:
    """What a function gives for each number; it spends its time outside Python's lock."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, ids))


def discarded(path: Path) -> ValueError:
    """Delete a file of ours that is not what was written, as after a crash of the machine."""
    path.unlink()
    return ValueError(f"{path} was damaged and is deleted; the same command draws it again")


# -- PNG files ----------------------------------------------------------------------------

PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every PNG file


def is_whole_png(path: Path) -> bool:
    """Whether a file ends as a PNG file does; an empty or cut one does not."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(PNG_END)))
        return file.read() == PNG_END


def read_png(path: Path) -> np.ndarray:
    """Pixels (H, W, C) uint8, C = 1 or 3.

    Raises:
        ValueError: the file's checksums do not hold, or it does not decode; it is deleted.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksum of each chunk, which decoding does not look at
        pixels = np.asarray(Image.open(io.BytesIO(content)))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises, by the place of the damage
        raise discarded(path) from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


# -- one array of all pixels --------------------------------------------------------------


def write_npz(
    path: Path, shape: Sequence[int], pixels: Iterable[np.ndarray], labels: np.ndarray
) -> None:
    """The file that `np.savez(path, pixels, labels)` writes, from a few images at a time.

    Args:
        shape: (N, H, W, C).
        pixels: uint8 arrays (n, H, W, C), N images in all.
        labels: (N,).
    """
    with atomic_write(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        _write_array(archive, "arr_0.npy", tuple(shape), np.dtype(np.uint8), pixels)
        _write_array(archive, "arr_1.npy", labels.shape, labels.dtype, [labels])


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: Iterable[np.ndarray],
) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(name, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, about)
        for chunk in chunks:
            member.write(np.ascontiguousarray(chunk).data)


def num_in_npz(path: Path) -> int:
    """Of how many samples such a file is; 0 where there is none.

    Raises:
        ValueError: the file is not one that `write_npz` wrote; it is deleted.
    """
    if not path.exists():
        return 0
    try:
        return npz.header(path, "arr_0").shape[0]
    except NpzError:
        raise discarded(path) from None


def open_npz(path: Path) -> np.ndarray | None:
    """The pixels (N, H, W, C) of such a file, read from the disk when they are used; None if none.

    Raises:
        ValueError: the file is damaged; it is deleted.
    """
    if not path.exists():
        return None
    status = path.stat()
    return _mapped(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _mapped(path: Path, mtime: int, size: int) -> np.ndarray:
    """All rows are read once, one by one, to compare their checksum."""
    try:
        shape, _, dtype = npz.header(path, "arr_0")
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for _ in npz.rows(path, "arr_0"):
                pass
            member = archive.getinfo("arr_0.npy")  # stored as it is, after a header of its own
            file.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    except NpzError:
        raise discarded(path) from None
    num_bytes = math.prod(shape) * dtype.itemsize
    return np.memmap(path, dtype, "r", start + member.file_size - num_bytes, shape)
