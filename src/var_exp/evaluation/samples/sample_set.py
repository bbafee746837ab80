"""A set of many samples in a folder, drawn by many processes and finished in spite of any of them.

Sample i is a function of (networks, settings, seed, i, label), so a set is decided by plain data,
its plan, and by how many samples it has. What is finished shows in the files: whoever is killed at
any point goes on from there, with as many processes as there are then, and ends with the same
files. Samples are drawn in batches that depend on nothing but their size, so that even what
depends on the company of a sample, the last bit on a GPU, is the same after an interruption.

    N samples, n of a batch of them, K scales, (H, W, C) an image
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_exp.evaluation.samples.files import Parts, SampleFolder, in_threads, write_npz
from var_exp.sampling.generate import ROWS, Samples
from var_exp.tokenizer import VQVAE
from var_exp.visualization.images import class_grid, coarse_to_fine, save_png, to_uint8

MAX_GRID = 400  # samples that the grid shows
STRIP = 8  # samples that are shown scale by scale

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


class SampleSet(SampleFolder):
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
        super().__init__(folder, plan, num_samples)
        self.keep_png, self.keep_npz, self.has_scores = png, npz, scores is not None
        self.num_per_scale = num_per_scale if self.has_scores else 0
        seen = hashlib.sha256(json.dumps([scores, self.num_per_scale]).encode()).hexdigest()[:16]
        self.parts |= {
            kind: Parts(self.unfinished / name)
            for kind, name in (("codes", "codes"), ("seen", f"seen_{seen}"))
        }

    @property
    def labels(self) -> list[int]:
        """One class for each sample."""
        classes = self.plan["classes"]
        return [classes[i % len(classes)] for i in range(self.num_samples)]

    # -- what is missing ------------------------------------------------------------------

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
        png[list(self.numbered())] = True
        for kind, there in (("pixels", pixels), ("codes", codes), ("seen", seen)):
            for run in self.parts[kind].runs():
                there[run.start : run.stop] = True
        pixels |= png
        pixels[: self.num_in_npz()] = True

        num_needed = 0 if self.grid.exists() else MAX_GRID  # of pixels
        if self.keep_npz and self.num_in_npz() != n:
            num_needed = n
        lacks = {
            "png": ~png & self.keep_png,
            "pixels": ~pixels & (ids < num_needed) & (not self.keep_png),
            "codes": ~codes & (ids < STRIP) & (not self.strip.exists()),
            "seen": ~seen & (self.has_scores and not scored),
        }
        lacks["draw"] = ~pixels & (lacks["png"] | lacks["pixels"] | lacks["seen"])
        lacks["draw"] |= lacks["codes"] | lacks["seen"] & (ids < self.num_per_scale)
        return lacks

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
        in_threads(lambda i: save_png(pixels[i - job.start], self.png(i)), job.pngs)
        if "pixels" in job.parts:
            self.parts["pixels"].write(job.ids, {"pixels": torch.from_numpy(pixels)})
        if "codes" in job.parts:
            first = {f"{k:02d}": x[:STRIP].cpu() for k, x in enumerate(samples.indices)}
            self.parts["codes"].write(range(len(first["00"])), first)
        if "seen" in job.parts:
            rounded = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            indices = samples.indices if job.start < self.num_per_scale else []
            self.parts["seen"].write(job.ids, see(job.ids, Samples(rounded, indices)))

    # -- the whole ------------------------------------------------------------------------

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
        if self.keep_npz and self.num_in_npz() != self.num_samples:
            ids = range(self.num_samples)
            starts = tqdm(ids[::batch_size], "writing samples.npz", leave=False, disable=None)
            write_npz(
                self.npz,
                (self.num_samples, *self.pixels([0]).shape[1:]),
                (self.pixels(ids[start : start + batch_size]) for start in starts),
                np.array(self.labels),
            )
        if not self.grid.exists():
            save_png(self._grid(class_names), self.grid)
        if not self.strip.exists():
            save_png(self._strip(tokenizer, class_names), self.strip)
        if self.num_in_npz() not in (0, self.num_samples):  # an earlier one, not asked for again
            self.npz.unlink()

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
