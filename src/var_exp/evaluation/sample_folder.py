"""The folder of a set of samples: whose samples lie in it, and where the pixels of each are.

Several files may hold the pixels of a sample, all of them the same. The files are:

    plan.json               what the samples are
    000000.png ...          by choice
    unfinished/             what is needed until the whole is written: pixels where there are no PNG
                            files, what scores saw of each sample, codes of the first samples
    samples.npz             by choice, of all pixels and labels
    grid.png, coarse_to_fine.png

    N samples, n of them, (H, W, C) an image
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from var_exp.evaluation.sample_files import (
    Parts,
    forget_scores,
    is_whole_png,
    open_npz,
    read_png,
)
from var_exp.files import read_figures, replacing

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
