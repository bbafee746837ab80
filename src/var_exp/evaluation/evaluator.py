"""What is measured and drawn of a trained model, in one place for training and for its end.

Scores are shared work: each process draws and sees every n-th image, and all of them must call.
Sums are exact, so that the figures do not depend on the number of processes. Pictures are drawn
by whoever asks.

    B batch, N samples, K scales
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from var_exp.evaluation.features import FeatureNetwork
from var_exp.evaluation.fidelity import Fidelity, Judge, class_accuracy
from var_exp.evaluation.pictures import class_grid, coarse_to_fine, reconstructions, save_png
from var_exp.sampling import iterate_samples
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

MAX_REFERENCE = 10_000  # training images that a Fréchet distance compares with
MAX_ROWS = 20  # classes that a picture of samples shows


class Drawn(NamedTuple):
    """grid, strip: uint8 (H, W, 3) pictures of samples by class, and scale by scale."""

    grid: np.ndarray
    strip: np.ndarray


class Evaluator:
    """Scores and pictures of models of one source of images.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up.
        network: the features in which samples are compared with training images.
        settings: how samples are drawn; arguments of `var_exp.sampling.generate`.
        num_samples: how many the final scores are measured on.
        batch_size: samples at once.
        seed: of the samples.
    """

    def __init__(
        self,
        source: Any,
        network: FeatureNetwork,
        settings: dict[str, Any],
        num_samples: int = 500,
        batch_size: int = 100,
        seed: int = 0,
    ):
        self.source, self.network = source, network
        self.settings, self.seed = settings, seed
        self.num_samples, self.batch_size = num_samples, batch_size
        self.fidelity = Fidelity(network)
        self._has_reference = False

    @property
    def judge(self) -> Judge | None:
        """Says from pixels which class an image shows; None where there are no classes.

        The source's own where it has one, else the classifier of the feature network.
        """
        if self.source.num_classes == 0:
            return None
        return self.source.judge or self.network.judge

    def labels(self, num_samples: int) -> list[int]:
        """Every class equally often, in turn; "no class" (0) where there are none."""
        return [i % max(1, self.source.num_classes) for i in range(num_samples)]

    # -- scores ---------------------------------------------------------------------------

    def score_samples(
        self, transformer: VAR, tokenizer: VQVAE, num_samples: int
    ) -> dict[str, float]:
        """FID, Inception Score and, with classes, the share that the judge finds right."""
        self.fidelity.to(_device(tokenizer))
        self._read_reference()
        self.fidelity.reset(keep_real=True)
        labels = self.labels(num_samples)
        ids = list(range(*_share(num_samples)))
        hits = Hits(self.judge, _device(tokenizer))
        drawn = self._draw(transformer, tokenizer, [labels[i] for i in ids], ids)
        total = math.ceil(len(ids) / self.batch_size)
        for chosen, samples in tqdm(drawn, "scoring samples", total, leave=False, disable=None):
            self.fidelity.update_fake(samples.images, torch.tensor(chosen))
            hits.add(samples.images, torch.tensor([labels[i] for i in chosen]))
        return self.fidelity.compute() | hits.share("class_accuracy")

    def score_reconstructions(
        self, tokenizer: VQVAE, num_images: int | None = None
    ) -> dict[str, float]:
        """How close reconstructions of validation images come to them.

        Their FID to the very images they are made of, under the network's name and that of the
        crop where the source has one; and what the judge finds right of both.

        Args:
            num_images: how many validation images, drawn evenly; all of them for None.
        """
        fidelity = Fidelity(self.network).to(_device(tokenizer))
        real, rebuilt = (Hits(self.judge, _device(tokenizer)) for _ in range(2))
        for images, labels in _batches(self.source, self.source.val, self.batch_size, num_images):
            decoded, originals = _rebuild(tokenizer, images), images.add(1).div(2)
            fidelity.update_real(originals)
            fidelity.update_fake(decoded)
            real.add(originals, labels)
            rebuilt.add(decoded, labels)
        scores = {}
        if len(self.source.val) > 1 and num_images != 1:  # of one image there is no distance
            name = "_".join(filter(None, ("rfid", self.network.name, self.source.crop)))
            scores[name] = fidelity.compute()[f"fid_{self.network.name}"]
        return scores | real.share("class_accuracy_real") | rebuilt.share("class_accuracy")

    # -- at the end of a stage ------------------------------------------------------------

    def conclude_tokenizer(self, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `reconstructions.png` and return the scores of reconstructions."""
        if _is_first():
            picture = self.reconstruction_picture(tokenizer, num_images=12)
            save_png(picture, folder / "reconstructions.png")
        return self.score_reconstructions(tokenizer)

    def conclude_var(self, transformer: VAR, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `grid.png` and `coarse_to_fine.png` and return the scores of samples."""
        if _is_first():
            drawn = self.draw_per_class(transformer, tokenizer, num_per_class=10)
            save_png(drawn.grid, folder / "grid.png")
            save_png(drawn.strip, folder / "coarse_to_fine.png")
        return self.score_samples(transformer, tokenizer, self.num_samples)

    # -- pictures -------------------------------------------------------------------------

    def draw_per_class(self, transformer: VAR, tokenizer: VQVAE, num_per_class: int) -> Drawn:
        """A row of samples for each of the first classes, and one of each scale by scale."""
        num_rows = min(max(1, self.source.num_classes), MAX_ROWS)
        labels = [i % num_rows for i in range(num_per_class * num_rows)]
        ids = list(range(len(labels)))
        drawn = [samples for _, samples in self._draw(transformer, tokenizer, labels, ids)]
        images = torch.cat([samples.images for samples in drawn]).cpu()
        codes = [
            torch.cat(scale)[:num_rows] for scale in zip(*(s.indices for s in drawn), strict=True)
        ]
        steps = [x.add(1).div(2).cpu() for x in tokenizer.decode(codes, per_scale=True)]
        names = list(self.source.class_names)
        grid = class_grid(images, torch.tensor(labels), names, columns=num_per_class)
        return Drawn(grid, coarse_to_fine(steps, tokenizer.schedule.sizes, names[:num_rows]))

    def reconstruction_picture(self, tokenizer: VQVAE, num_images: int) -> np.ndarray:
        """The first validation images, and what each scale makes of them: uint8 (H, W, 3)."""
        images, _ = _load(self.source, self.source.val, range(num_images))
        rebuilt = _rebuild(tokenizer, images, per_scale=True)
        return reconstructions(images.add(1).div(2), rebuilt, tokenizer.schedule.sizes)

    # -- parts ----------------------------------------------------------------------------

    def _draw(self, transformer: VAR, tokenizer: VQVAE, labels: list[int], ids: list[int]):
        return iterate_samples(
            transformer,
            tokenizer,
            labels,
            sample_ids=ids,
            batch_size=self.batch_size,
            seed=self.seed,
            **self.settings,
        )

    def _read_reference(self) -> None:
        if self._has_reference:
            return
        for images, _ in _batches(self.source, self.source.train, self.batch_size, MAX_REFERENCE):
            self.fidelity.update_real(images.add(1).div(2))
        self._has_reference = True


class Hits:
    """How many images a judge takes for what they should be, over all processes."""

    def __init__(self, judge: Judge | None, device: torch.device):
        self.judge, self.counts = judge, torch.zeros(2, device=device)  # right, seen

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Images (B, C, H, W) in [0, 1] and their labels (B,)."""
        if self.judge is not None:
            right = class_accuracy(images.cpu(), labels, self.judge) * len(labels)
            self.counts += torch.tensor([round(right), len(labels)]).to(self.counts)

    def share(self, name: str) -> dict[str, float]:
        """The share of hits under a name; nothing without a judge."""
        if self.judge is None:
            return {}
        if _is_distributed():
            dist.all_reduce(self.counts)
        right, seen = self.counts.tolist()
        return {name: right / seen}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_first() -> bool:
    return not _is_distributed() or dist.get_rank() == 0


def _share(count: int) -> tuple[int, int, int]:
    """(start, stop, step) of this process's part of `count` images.

    Raises:
        ValueError: fewer images than processes: one without any could not take part.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    if count < size:
        raise ValueError(
            f"evaluation: expected at least one image for each of {size} processes, got {count} "
            f"(evaluation.num_samples, evaluation.num_samples_val, or more validation images)"
        )
    return rank, count, size


def _device(network: VQVAE) -> torch.device:
    return next(network.parameters()).device


def _batches(
    source: Any, dataset: Any, size: int, limit: int | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    """This process's images (B, C, H, W) in [-1, 1] and labels (B,): all, or `limit` drawn ones."""
    chosen = range(len(dataset))
    if limit is not None and limit < len(dataset):
        # Not the first ones: sets on disk are often sorted by class.
        chosen = np.random.default_rng(0).permutation(len(dataset))[:limit].tolist()
    ours = chosen[slice(*_share(len(chosen)))]
    for start in range(0, len(ours), size):
        yield _load(source, dataset, ours[start : start + size])


def _load(source: Any, dataset: Any, chosen: Iterable[int]) -> tuple[Tensor, Tensor]:
    items = [dataset[i] for i in chosen if i < len(dataset)]
    images = torch.stack([source.val_transform(image) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


@torch.no_grad()
def _rebuild(tokenizer: VQVAE, images: Tensor, per_scale: bool = False) -> Tensor | list[Tensor]:
    """Reconstructions in [0, 1], on the CPU; with `per_scale` those after each scale."""
    indices = tokenizer.encode(images.to(_device(tokenizer)))
    if per_scale:
        return [x.add(1).div(2).cpu() for x in tokenizer.decode(indices, per_scale=True)]
    return tokenizer.decode(indices).add(1).div(2).cpu()
