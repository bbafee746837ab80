"""A set of many samples in a folder, drawn by many processes and finished in spite of any of them.

Sample i is a function of (networks, settings, seed, i, label), so a set is decided by plain data,
its plan, and by how many samples it has. What is finished shows in the files: whoever is killed at
any point goes on from there, with as many processes as there are then, and ends with the same
files. Samples are drawn in batches that depend on nothing but their size, so that even what
depends on the company of a sample, the last bit on a GPU, is the same after an interruption.

    plan.json             what decides the samples, and how many; by it the folder is ours
    000000.png ...        the samples
    samples.npz           all of them in one array, with their labels
    grid.png, coarse_to_fine.png
    unfinished/           features for scores, and pixels without a PNG file, by batch

    N samples, n of a batch of them, K scales, (H, W, C) an image
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_exp.evaluation.sampler import Sampler, device_of
from var_exp.evaluation.samples.files import (
    discarded,
    in_threads,
    num_in_npz,
    open_npz,
    read_png,
    write_npz,
)
from var_exp.evaluation.samples.folder import SampleFolder
from var_exp.evaluation.scorer import SampleFeatures, SampleScorer
from var_exp.io import npz
from var_exp.io.npz import NpzError
from var_exp.sampling.generate import Samples, round_up
from var_exp.sampling.labels import take_turns
from var_exp.visualization.images import class_grid, coarse_to_fine, save_png, to_uint8

MAX_GRID = 400  # samples that the grid shows
STRIP = 8  # samples that are shown scale by scale


class Batch(NamedTuple):
    """Samples start to stop - 1, of which something is missing.

    draw: whether they must be drawn; else their pixels are there.
    arrays: what to keep of them until the set is finished, of "pixels" and "features".
    """

    start: int
    stop: int
    draw: bool = False
    arrays: tuple[str, ...] = ()

    @property
    def ids(self) -> range:
        return range(self.start, self.stop)

    @property
    def name(self) -> str:
        return f"{self.start:06d}-{self.stop:06d}.npz"


class SampleSet(SampleFolder):
    """Samples 0..N - 1 of a plan, in a folder.

    Args:
        folder: may be shared by processes; one of them calls `begin`, `missing` and `finish`.
        plan: plain data that decides every sample, see `Sampler.plan`.
        num_samples: N.
        batch_size: samples that are drawn at once.
        png: keep a PNG file of each sample.
        npz: write `samples.npz`.
        scores: what decides the features that scores are made of, plain data; None: no scores.
        num_per_scale: so many of the first samples have features after each scale too.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        num_samples: int,
        *,
        batch_size: int = 64,
        png: bool = True,
        npz: bool = True,
        scores: dict[str, Any] | None = None,
        num_per_scale: int = 0,
    ):
        self.rows = round_up(batch_size)
        self.keep_png, self.keep_npz, self.has_scores = png, npz, scores is not None
        self.num_per_scale = num_per_scale if self.has_scores else 0
        decides = [plan, self.rows, png, scores, self.num_per_scale]
        super().__init__(folder, plan, num_samples, decides)

    @property
    def labels(self) -> list[int]:
        """One class for each sample."""
        return take_turns(self.plan["classes"], range(self.num_samples))

    # -- what is missing ------------------------------------------------------------------

    def missing(self, scored: bool = False) -> list[Batch]:
        """Batches of which something is missing, in order.

        Args:
            scored: the scores are known already, so that no features are needed.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its samples are drawn again.
        """
        if self.parts.read_record() != self.parts.work | {"parts": {}}:
            self.parts.remove()  # of another batch size, or for other scores
        self.parts.begin()
        png, in_npz = set(self.numbered()), num_in_npz(self.npz)
        num_needed = 0 if self.grid.exists() else MAX_GRID  # of pixels
        if self.keep_npz and in_npz != self.num_samples:
            num_needed = self.num_samples
        found = []
        for batch in self._batches():
            kept = self._kept(batch)
            in_files = all(i in png or i < in_npz for i in batch.ids)
            arrays = set(kept)
            if not self.keep_png and batch.start < num_needed and not in_files:
                arrays.add("pixels")
            if self.has_scores and not scored:
                arrays.add("features")
            if arrays > kept or (self.keep_png and not png.issuperset(batch.ids)):
                scales = "features" in arrays - kept and batch.start < self.num_per_scale
                draw = scales or not (in_files or "pixels" in kept)
                found.append(batch._replace(draw=draw, arrays=tuple(sorted(arrays))))
        return found

    def _batches(self) -> list[Batch]:
        starts = range(0, self.num_samples, self.rows)
        return [Batch(start, min(start + self.rows, self.num_samples)) for start in starts]

    def _kept(self, batch: Batch) -> set[str]:
        """What is whole in `unfinished` of a batch."""
        if not self.parts.is_whole(batch.name, lambda line: print(line, file=sys.stderr)):
            return set()
        return npz.names(self.parts.folder / batch.name) & {"pixels", "features"}

    # -- pixels ---------------------------------------------------------------------------

    def pixels(self, ids: range) -> np.ndarray:
        """Samples (n, H, W, C) uint8, from whatever file holds them.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its sample is drawn again.
        """
        found = dict(zip(ids, in_threads(self._read_png, ids), strict=True))
        if left := [i for i in ids if found[i] is None]:
            array = open_npz(self.npz)
            found |= {i: array[i] for i in left if array is not None and i < len(array)}
        for batch in self._batches():
            if left := [i for i in ids if found[i] is None and i in batch.ids]:
                array = self._read(batch)["pixels"]
                found |= {i: array[i - batch.start] for i in left}
        return np.stack([found[i] for i in ids])

    def _read_png(self, sample_id: int) -> np.ndarray | None:
        path = self.png(sample_id)
        return read_png(path) if path.exists() else None

    def _read(self, batch: Batch) -> dict[str, np.ndarray]:
        path = self.parts.folder / batch.name
        try:
            return {name: npz.read(path, name) for name in sorted(npz.names(path))}
        except NpzError:
            raise discarded(path) from None

    # -- drawing --------------------------------------------------------------------------

    def fill(self, batch: Batch, sampler: Sampler, scorer: SampleScorer | None) -> None:
        """Write what a batch lacks.

        Images are rounded to 8 bits before scores see them, as they are in files.
        """
        samples = sampler.sample_batch(batch.ids) if batch.draw else None
        if samples is not None:
            pixels = to_uint8(samples.images).permute(0, 2, 3, 1).cpu().numpy()  # (n, H, W, C)
        else:
            pixels = self.pixels(batch.ids)
        if self.keep_png:
            left = [i for i in batch.ids if not self.png(i).exists()]
            in_threads(lambda i: save_png(pixels[i - batch.start], self.png(i)), left)
        arrays = {"pixels": pixels} if "pixels" in batch.arrays else {}
        if "features" in batch.arrays and scorer is not None:
            rounded = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            per_scale = batch.start < self.num_per_scale
            labels = torch.tensor(sampler.labels(batch.ids))
            drawn = Samples(rounded, [] if samples is None else samples.indices)
            with sampler.autocast():
                features = scorer.extract_features(sampler.tokenizer, drawn, labels, per_scale)
            arrays |= {name: tensor.numpy() for name, tensor in features.items()}
        if arrays:
            self.parts.write(batch.name, lambda path: npz.write(path, arrays))

    # -- the whole ------------------------------------------------------------------------

    def features(self) -> Iterator[tuple[Tensor, SampleFeatures]]:
        """The features of each sample, once and in order: (numbers (n,), features).

        Raises:
            ValueError: a file is damaged; it is deleted, so that its samples are drawn again.
        """
        for batch in self._batches():
            arrays = self._read(batch)
            middle = min(max(batch.start, self.num_per_scale), batch.stop)
            for ids, per_scale in (
                (range(batch.start, middle), True),
                (range(middle, batch.stop), False),
            ):
                if ids:
                    rows = slice(ids.start - batch.start, ids.stop - batch.start)
                    yield (
                        torch.tensor(ids),
                        {
                            name: torch.tensor(array[rows])
                            for name, array in arrays.items()
                            if name != "pixels" and (per_scale or name != "scale_features")
                        },
                    )

    def finish(self, sampler: Sampler, class_names: Sequence[str]) -> None:
        """Write the npz and the pictures, where they are missing.

        Raises:
            ValueError: a file is damaged; it is deleted, so that its sample is drawn again.
        """
        if self.keep_npz and num_in_npz(self.npz) != self.num_samples:
            batches = tqdm(self._batches(), "writing samples.npz", leave=False, disable=None)
            shape = (self.num_samples, *self.pixels(range(1)).shape[1:])
            pixels = (self.pixels(batch.ids) for batch in batches)
            write_npz(self.npz, shape, pixels, np.array(self.labels))
        if not self.grid.exists():
            save_png(self._grid(class_names), self.grid)
        if not self.strip.exists():
            save_png(self._strip(sampler, class_names), self.strip)
        if num_in_npz(self.npz) not in (0, self.num_samples):  # an earlier one, not asked for now
            self.npz.unlink()

    def _grid(self, class_names: Sequence[str]) -> np.ndarray:
        ids = range(min(MAX_GRID, self.num_samples))
        images = torch.from_numpy(self.pixels(ids)).permute(0, 3, 1, 2) / 255
        return class_grid(images, torch.tensor(self.labels[: len(ids)]), class_names)

    def _strip(self, sampler: Sampler, class_names: Sequence[str]) -> np.ndarray:
        """The first samples, drawn once more, after each scale."""
        ids = range(min(STRIP, self.num_samples))
        tokenizer, codes = sampler.tokenizer, sampler.sample_batch(ids).indices
        with sampler.autocast():
            steps = tokenizer.decode([c.to(device_of(tokenizer)) for c in codes], per_scale=True)
        names = [[*class_names, "no class"][self.labels[i]] for i in ids]
        images = [x.add(1).div(2).cpu() for x in steps]
        return coarse_to_fine(images, tokenizer.schedule.sizes, names)


def draw_missing(
    samples: SampleSet,
    missing: list[Batch],
    sampler: Sampler,
    scorer: SampleScorer | None,
    rank: int,
    world_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Do this process's share of the batches; the first one shows how far all have come.

    Args:
        on_batch: called before each batch; it may end the work.
    """
    num_left = sum(len(batch.ids) for batch in missing)
    done = {"initial": samples.num_samples - num_left, "total": samples.num_samples}
    hidden = True if rank else None  # None: shown on a terminal
    with tqdm(desc="sampling", unit="image", disable=hidden, **done) as bar:
        for start in range(0, len(missing), world_size):
            together = missing[start : start + world_size]
            on_batch()
            for batch in together[rank : rank + 1]:
                samples.fill(batch, sampler, scorer)
            bar.update(sum(len(batch.ids) for batch in together))
