"""A set of many samples in a folder, drawn by many processes and finished in spite of any of them.

Sample i is a function of (networks, settings, seed, i, label), so a set is decided by plain data,
its plan, and by how many samples it has. What is finished shows in the files: whoever is killed at
any point goes on from there, with as many processes as there are then, and ends with the same
files. Samples are drawn in batches that depend on nothing but their size, so that even what
depends on the company of a sample, the last bit on a GPU, is the same after an interruption.

    plan.json               what the samples are
    000000.png ...          by choice
    unfinished/             what is needed until the whole is written: pixels where there are no PNG
                            files, what scores saw of each sample, codes of the first samples
    samples.npz             by choice, of all pixels and labels
    grid.png, coarse_to_fine.png

    N samples, n of a batch of them, K scales, (H, W, C) an image
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from var_exp.evaluation.pictures import class_grid, coarse_to_fine, save_png, to_uint8
from var_exp.evaluation.sample_files import (
    Parts,
    forget_scores,
    is_whole_png,
    open_npz,
    read_png,
    write_npz,
)
from var_exp.files import replacing
from var_exp.sampling import ROWS, Samples
from var_exp.tokenizer import VQVAE

MAX_GRID = 400  # samples that the grid shows
STRIP = 8  # samples that are shown scale by scale
THREADS = min(8, os.cpu_count() or 1)  # that write and read PNG files
PLAN, NPZ, GRID, FINE = "plan.json", "samples.npz", "grid.png", "coarse_to_fine.png"
NUMBERED = re.compile(r"(\d{6,})\.png")
BESIDE = re.compile(r"\.(\d{6,}|plan|samples|grid|coarse_to_fine|metrics)\.\d+\.(png|npz|json)")

Draw = Callable[[range], Samples]
See = Callable[[range, Samples], dict[str, Tensor]]


class Job(NamedTuple):
    """A batch of samples of which something is missing.

    start, stop: of their numbers.
    draw: whether they must be drawn; else their pixels are there.
    pngs: numbers of the PNG files to write.
    parts: what else to write, of pixels, codes and seen.
    """

    start: int
    stop: int
    draw: bool
    pngs: list[int]
    parts: list[str]

    @property
    def ids(self) -> range:
        return range(self.start, self.stop)


class SampleSet:
    """Samples 0..N - 1 of a plan, in a folder.

    Args:
        folder: may be shared by processes; one of them calls `begin`, `jobs` and `finish`.
        plan: plain data that decides every sample; `classes` in it take turns.
        num_samples: N.
        png: keep a PNG file of each sample.
        npz: write `samples.npz`.
        scores: what decides the way samples are seen for scores, plain data; None: no scores.
        num_per_scale: so many of the first samples are seen after each scale too.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        num_samples: int,
        *,
        png: bool = True,
        npz: bool = True,
        scores: dict[str, Any] | None = None,
        num_per_scale: int = 0,
    ):
        self.folder, self.num_samples = Path(folder), num_samples
        self.plan = json.loads(json.dumps(plan))
        self.png, self.npz, self.has_scores = png, npz, scores is not None
        self.num_per_scale = num_per_scale if self.has_scores else 0
        self.unfinished = self.folder / "unfinished"
        seen = hashlib.sha256(json.dumps([scores, self.num_per_scale]).encode()).hexdigest()[:16]
        self.parts = {
            kind: Parts(self.unfinished / name)
            for kind, name in (("pixels", "pixels"), ("codes", "codes"), ("seen", f"seen_{seen}"))
        }

    @property
    def labels(self) -> list[int]:
        """One class for each sample."""
        classes = self.plan["classes"]
        return [classes[i % len(classes)] for i in range(self.num_samples)]

    # -- what is there, and what is missing -----------------------------------------------

    def begin(self) -> str | None:
        """Make the folder one of this set, keeping what belongs to it.

        Returns:
            A line for the user where samples of another plan were there, which are deleted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if BESIDE.fullmatch(path.name):  # of a process that was killed
                path.unlink()
        line, (plan, num_samples) = None, self._earlier()
        if plan != self.plan:
            line = self._replace(plan)
        elif num_samples != self.num_samples:
            self._forget_whole()
        for i, path in self._numbered().items():
            if i >= self.num_samples or not is_whole_png(path):
                path.unlink()
        content = {"plan": self.plan, "num_samples": self.num_samples}
        with replacing(self.folder / PLAN) as unfinished:
            unfinished.write_text(json.dumps(content) + "\n")
        return line

    def _earlier(self) -> tuple[dict[str, Any], int]:
        try:
            content = json.loads((self.folder / PLAN).read_text())
            return content["plan"], content["num_samples"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, or damaged
            return {}, 0

    def _replace(self, earlier: dict[str, Any]) -> str | None:
        (self.folder / PLAN).unlink(missing_ok=True)  # first: what is left then has no plan
        numbered = self._numbered()
        had_some = numbered or self.unfinished.exists() or (self.folder / NPZ).exists()
        self._forget_whole()
        (self.folder / NPZ).unlink(missing_ok=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        for path in numbered.values():
            path.unlink()
        differ = [key for key in self.plan if earlier.get(key) != self.plan[key]]
        why = f"with other {', '.join(differ)}" if earlier else "in a way that is not recorded"
        return f"{self.folder}: replacing samples that were drawn {why}" if had_some else None

    def _forget_whole(self) -> None:
        """Delete what speaks of all samples, but for pixels."""
        (self.folder / GRID).unlink(missing_ok=True)
        (self.folder / FINE).unlink(missing_ok=True)
        forget_scores(self.folder / "metrics.json")

    def _numbered(self) -> dict[int, Path]:
        """The PNG files of samples, by number."""
        matches = {path: NUMBERED.fullmatch(path.name) for path in self.folder.iterdir()}
        return {int(match[1]): path for path, match in matches.items() if match}

    def jobs(self, batch_size: int, scored: bool = False) -> list[Job]:
        """Batches of which something is missing, in order.

        Args:
            scored: the scores are known already, so that nothing needs to be seen.
        """
        n, missing = self.num_samples, self._missing(scored)
        rows = -(-batch_size // ROWS) * ROWS
        batches = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
        found = []
        for batch in batches:
            here = {kind: ids[batch] for kind, ids in missing.items()}
            parts = [kind for kind in self.parts if here[kind].any()]
            pngs = (here["png"].nonzero()[0] + batch.start).tolist()
            if parts or pngs:
                draw = bool(here["draw"].any())
                found.append(Job(batch.start, batch.stop, draw, pngs, parts))
        return found

    def _missing(self, scored: bool) -> dict[str, np.ndarray]:
        """Which samples lack what, as (N,) bool by kind; "draw" for those to be drawn."""
        n, ids = self.num_samples, np.arange(self.num_samples)
        png, (pixels, codes, seen) = np.zeros(n, bool), np.zeros((3, n), bool)
        png[list(self._numbered())] = True
        for kind, there in (("pixels", pixels), ("codes", codes), ("seen", seen)):
            for run in self.parts[kind].runs():
                there[run.start : run.stop] = True
        pixels |= png
        pixels[: self._num_in_npz()] = True

        num_needed = 0 if (self.folder / GRID).exists() else MAX_GRID  # of pixels
        if self.npz and self._num_in_npz() != n:
            num_needed = n
        lacks = {
            "png": ~png & self.png,
            "pixels": ~pixels & (ids < num_needed) & (not self.png),
            "codes": ~codes & (ids < STRIP) & (not (self.folder / FINE).exists()),
            "seen": ~seen & (self.has_scores and not scored),
        }
        lacks["draw"] = ~pixels & (lacks["png"] | lacks["pixels"] | lacks["seen"])
        lacks["draw"] |= lacks["codes"] | lacks["seen"] & (ids < self.num_per_scale)
        return lacks

    def _num_in_npz(self) -> int:
        held = open_npz(self.folder / NPZ)
        return 0 if held is None else len(held)

    # -- drawing --------------------------------------------------------------------------

    def fill(self, job: Job, draw: Draw, see: See | None = None) -> None:
        """Write what a job lacks.

        Args:
            draw: numbers -> samples.
            see: numbers and samples -> what scores need of them. Images are rounded to 8 bits,
                as they are in files; indices are there where each scale counts.
        """
        samples = draw(job.ids) if job.draw else Samples(None, [])
        if job.draw:
            pixels = to_uint8(samples.images).permute(0, 2, 3, 1).cpu().numpy()  # (n, H, W, C)
        else:
            pixels = self.pixels(job.ids)
        _in_threads(lambda i: save_png(pixels[i - job.start], self._png(i)), job.pngs)
        if "pixels" in job.parts:
            self.parts["pixels"].write(job.ids, {"pixels": torch.from_numpy(pixels)})
        if "codes" in job.parts:
            first = {f"{k:02d}": x[:STRIP].cpu() for k, x in enumerate(samples.indices)}
            self.parts["codes"].write(range(len(first["00"])), first)
        if "seen" in job.parts:
            rounded = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            indices = samples.indices if job.start < self.num_per_scale else []
            self.parts["seen"].write(job.ids, see(job.ids, Samples(rounded, indices)))

    def _png(self, sample_id: int) -> Path:
        return self.folder / f"{sample_id:06d}.png"

    # -- the whole ------------------------------------------------------------------------

    def pixels(self, ids: Sequence[int]) -> np.ndarray:
        """Samples (n, H, W, C) uint8, from whatever file holds them.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its sample is drawn again.
        """
        held = open_npz(self.folder / NPZ)

        def read(i: int) -> np.ndarray:
            if self._png(i).exists():
                return read_png(self._png(i))
            if held is not None and i < len(held):
                return held[i]
            return self.parts["pixels"].row("pixels", i)

        return np.stack(_in_threads(read, ids))

    def seen(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """What `see` returned of each sample, once and in order: (numbers (n,), tensors).

        Raises:
            ValueError: a file is damaged; it is deleted, so that its samples are seen again.
        """
        done = 0
        for run in self.parts["seen"].runs():
            tensors = self.parts["seen"].read(run)
            for end, per_scale in ((self.num_per_scale, True), (self.num_samples, False)):
                ids = range(max(run.start, done), min(run.stop, end, self.num_samples))
                if ids:
                    rows = slice(ids.start - run.start, ids.stop - run.start)
                    yield (
                        torch.tensor(ids),
                        {k: v[rows] for k, v in tensors.items() if per_scale or k[:5] != "scale"},
                    )
                    done = ids.stop
        assert done == self.num_samples, "samples that were not seen"

    def finish(self, tokenizer: VQVAE, class_names: Sequence[str], batch_size: int) -> None:
        """Write the npz and the pictures, where they are missing.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its sample is drawn again.
        """
        if self.npz and self._num_in_npz() != self.num_samples:
            ids = range(self.num_samples)
            starts = tqdm(ids[::batch_size], "writing samples.npz", leave=False, disable=None)
            write_npz(
                self.folder / NPZ,
                (self.num_samples, *self.pixels([0]).shape[1:]),
                (self.pixels(ids[start : start + batch_size]) for start in starts),
                np.array(self.labels),
            )
        elif not self.npz and self._num_in_npz() not in (0, self.num_samples):
            (self.folder / NPZ).unlink()  # of another number of samples
        if not (self.folder / GRID).exists():
            save_png(self._grid(class_names), self.folder / GRID)
        if not (self.folder / FINE).exists():
            save_png(self._strip(tokenizer, class_names), self.folder / FINE)

    def _grid(self, class_names: Sequence[str]) -> np.ndarray:
        shown = range(min(MAX_GRID, self.num_samples))
        images = torch.from_numpy(self.pixels(shown)).permute(0, 3, 1, 2) / 255
        return class_grid(images, torch.tensor(self.labels[: len(shown)]), class_names)

    def _strip(self, tokenizer: VQVAE, class_names: Sequence[str]) -> np.ndarray:
        *_, run = self.parts["codes"].runs()
        codes = self.parts["codes"].read(run)
        first = range(min(STRIP, self.num_samples))
        device = next(tokenizer.parameters()).device
        steps = tokenizer.decode([codes[k][: len(first)].to(device) for k in sorted(codes)], True)
        names = [[*class_names, "no class"][self.labels[i]] for i in first]
        images = [x.add(1).div(2).cpu() for x in steps]
        return coarse_to_fine(images, tokenizer.schedule.sizes, names)

    def clear(self) -> None:
        """Delete what was needed until the whole, scores included, was written."""
        shutil.rmtree(self.unfinished, ignore_errors=True)


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits that change with any weight of a recorded network, or its form."""
    digest = hashlib.sha256(json.dumps(network.spec, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _in_threads(function: Callable[[int], Any], ids: Sequence[int]) -> list[Any]:
    """What a function gives for each number; it spends its time outside Python's lock."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, ids))
