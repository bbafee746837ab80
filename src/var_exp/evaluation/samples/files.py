"""Files that many samples are kept in: each is whole or not there, none needs them all in memory.

N samples, n of a run of them, (H, W, C) an image
"""

import io
import json
import math
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from var_exp.io import npz
from var_exp.io.files import replacing
from var_exp.io.npz import NpzError
from var_exp.io.run_folder import forget_scores, read_figures

THREADS = min(8, os.cpu_count() or 1)  # that write and read PNG files
NUMBERED = re.compile(r"(\d{6,})\.png")
BESIDE = re.compile(
    r"\.(\d{6,}|plan|samples|grid|coarse_to_fine|metrics|environment)\.\d+\.(png|npz|json)"
)


class SampleFolder:
    """Where samples 0..N - 1 of a plan lie.

    Args:
        folder: may hold other files too.
        plan: plain data that decides every sample.
        num_samples: N.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], num_samples: int):
        self.folder, self.num_samples = Path(folder), num_samples
        self.plan = json.loads(json.dumps(plan))  # as it will be read
        self.unfinished = self.folder / "unfinished"
        self.parts = {"pixels": Parts(self.unfinished / "pixels")}
        self.plan_file, self.npz = self.folder / "plan.json", self.folder / "samples.npz"
        self.grid, self.strip = self.folder / "grid.png", self.folder / "coarse_to_fine.png"

    # -- whose it is ----------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError where there are files that `begin` would take for samples of ours."""
        others = [path for path in (self.npz, self.grid, self.strip) if path.exists()]
        others += self.numbered().values() if self.folder.exists() else []
        if others and not self.plan_file.exists():
            raise ValueError(
                f"out_dir: {str(self.folder)!r} holds {others[0].name}, but no plan.json that says "
                f"it was drawn here, and it would be replaced; choose another folder "
                f"(out_dir=...), or move it away"
            )
        read_figures(self.folder / "metrics.json")  # or it would show when samples are drawn

    def begin(self) -> str | None:
        """Make the folder one of this plan, keeping what belongs to it.

        Returns:
            A line for the user where samples of another plan were there, which are deleted.

        Raises:
            ValueError: see `check`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        for path in self.folder.iterdir():
            if BESIDE.fullmatch(path.name):  # of a process that was killed
                path.unlink()
        line, (plan, num_samples) = None, self._recorded()
        if plan != self.plan:
            line = self._replace(plan)
        elif num_samples != self.num_samples:
            self._forget_whole()
        for i, path in self.numbered().items():
            if i >= self.num_samples or not is_whole_png(path):
                path.unlink()
        content = {"plan": self.plan, "num_samples": self.num_samples}
        with replacing(self.plan_file) as unfinished:
            unfinished.write_text(json.dumps(content) + "\n")
        return line

    def clear(self) -> None:
        """Delete what was needed until the whole, scores included, was written."""
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _recorded(self) -> tuple[dict[str, Any], int]:
        try:
            content = json.loads(self.plan_file.read_text())
            return dict(content["plan"]), content["num_samples"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, or damaged
            return {}, 0

    def _replace(self, earlier: dict[str, Any]) -> str | None:
        numbered = self.numbered()
        had_some = numbered or self.unfinished.exists() or self.npz.exists()
        self._forget_whole()
        self.npz.unlink(missing_ok=True)
        self.clear()
        for path in numbered.values():
            path.unlink()
        differ = [key for key in self.plan if earlier.get(key) != self.plan[key]]
        why = f"with other {', '.join(differ)}" if earlier else "in a way that is not recorded"
        return f"{self.folder}: replacing samples that were drawn {why}" if had_some else None

    def _forget_whole(self) -> None:
        """Delete what speaks of all samples, but for pixels."""
        self.grid.unlink(missing_ok=True)
        self.strip.unlink(missing_ok=True)
        forget_scores(self.folder / "metrics.json")

    # -- where pixels are -----------------------------------------------------------------

    def png(self, sample_id: int) -> Path:
        return self.folder / f"{sample_id:06d}.png"

    def numbered(self) -> dict[int, Path]:
        """The PNG files of samples, by number."""
        matches = {path: NUMBERED.fullmatch(path.name) for path in self.folder.iterdir()}
        return {int(match[1]): path for path, match in matches.items() if match}

    def num_in_npz(self) -> int:
        """Of how many samples the npz is; 0 where there is none.

        Raises:
            ValueError: the file is damaged; it is deleted.
        """
        held = open_npz(self.npz)
        return 0 if held is None else len(held)

    def pixels(self, ids: Sequence[int]) -> np.ndarray:
        """Samples (n, H, W, C) uint8, from whatever file holds them.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its sample is drawn again.
        """
        held = open_npz(self.npz)

        def read(i: int) -> np.ndarray | None:
            if self.png(i).exists():
                return read_png(self.png(i))
            return held[i] if held is not None and i < len(held) else None

        found = dict(zip(ids, in_threads(read, ids), strict=True))
        found |= self.parts["pixels"].rows("pixels", [i for i in ids if found[i] is None])
        return np.stack([found[i] for i in ids])


def in_threads(function: Callable[[int], Any], ids: Sequence[int]) -> list[Any]:
    """What a function gives for each number; it spends its time outside Python's lock."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, ids))


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
