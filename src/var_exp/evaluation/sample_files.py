"""Files that many samples are kept in: each is whole or not there, none needs them all in memory.

N samples, n of a run of them, (H, W, C) an image
"""

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from var_exp.evaluation import npz
from var_exp.evaluation.npz import NpzError
from var_exp.files import read_figures, replacing

PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every PNG file


def discarded(path: Path) -> ValueError:
    """Delete a file that is not what was written, as after a crash of the machine."""
    path.unlink()
    return ValueError(f"{path} was damaged and is deleted; the same command draws it again")


# -- PNG files ----------------------------------------------------------------------------


def is_whole_png(path: Path) -> bool:
    """Whether a file ends as a PNG file does; an empty or cut one does not."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(PNG_END)))
        return file.read() == PNG_END


def read_png(path: Path) -> np.ndarray:
    """Pixels (H, W, C) uint8, C = 1 or 3.

    Raises:
        ValueError: the file does not decode; it is deleted.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        pixels = np.asarray(Image.open(content))
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
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        _write_array(archive, "arr_0.npy", tuple(shape), np.dtype(np.uint8), pixels)
        _write_array(archive, "arr_1.npy", labels.shape, labels.dtype, [labels])


def _write_array(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Iterable[np.ndarray],
) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(name, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, about)
        for part in parts:
            member.write(np.ascontiguousarray(part).data)


def open_npz(path: Path) -> np.ndarray | None:
    """The pixels (N, H, W, C) of such a file, read from the disk when they are used; None if none.

    Raises:
        ValueError: the file is not one that `write_npz` wrote; it is deleted.
    """
    if not path.exists():
        return None
    try:
        shape, _, dtype = npz.header(path, "arr_0")
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            member = archive.getinfo("arr_0.npy")  # stored as it is, after a header of its own
            file.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    except NpzError:
        raise discarded(path) from None
    num_bytes = math.prod(shape) * dtype.itemsize
    return np.memmap(path, dtype, "r", start + member.file_size - num_bytes, shape)


# -- tensors of runs of samples -----------------------------------------------------------


class Parts:
    """Tensors of runs of samples, a file for each run: `000064-000128.safetensors`.

    Which samples are there shows in the names alone. Runs may overlap.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def runs(self) -> list[range]:
        """What is there, in order."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            if match := re.fullmatch(r"(\d+)-(\d+)", path.stem):
                found.append(range(int(match[1]), int(match[2])))
        return sorted(found, key=lambda run: (run.start, run.stop))

    def path(self, run: range) -> Path:
        return self.folder / f"{run.start:06d}-{run.stop:06d}.safetensors"

    def write(self, run: range, tensors: dict[str, Tensor]) -> None:
        """Keep tensors whose first dimension goes over the run."""
        with replacing(self.path(run)) as unfinished:
            save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished)

    def read(self, run: range) -> dict[str, Tensor]:
        """What was written of a run.

        Raises:
            ValueError: the file does not read; it is deleted.
        """
        try:
            return load_file(self.path(run))
        except SafetensorError:
            raise discarded(self.path(run)) from None

    def rows(self, name: str, ids: Iterable[int]) -> dict[int, np.ndarray]:
        """The rows of the tensor of this name, by sample; those that are there.

        Raises:
            ValueError: a file does not read; it is deleted.
        """
        found, left = {}, set(ids)
        for run in self.runs() if left else ():
            if here := left.intersection(run):
                tensor = self.read(run)[name].numpy()
                found |= {i: tensor[i - run.start] for i in here}
                left -= here
        return found


# -- figures ------------------------------------------------------------------------------


def forget_scores(path: Path) -> None:
    """Take the figures of samples out of a metrics.json; those of other stages stay.

    Raises:
        ValueError: the file is damaged.
    """
    metrics = read_figures(path)
    if not metrics:
        return
    kept = {key: value for key, value in metrics.items() if not key.startswith("sample/")}
    kept["protocol"] = {k: v for k, v in metrics.get("protocol", {}).items() if k != "sample"}
    if not kept["protocol"]:
        del kept["protocol"]
    if kept:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(kept, indent=2) + "\n")
    else:
        path.unlink()
