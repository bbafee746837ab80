"""What is measured and drawn of a trained model, in one place for training and for its end.

B batch, N samples, K scales
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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
        self._read_reference()
        self.fidelity.reset(keep_real=True)
        labels = self.labels(num_samples)
        hits = 0.0
        drawn = self._draw(transformer, tokenizer, labels)
        total = math.ceil(num_samples / self.batch_size)
        for ids, samples in tqdm(drawn, "scoring samples", total, leave=False, disable=None):
            images = samples.images.cpu()
            self.fidelity.update_fake(images, torch.tensor(ids))
            if self.judge is not None:
                classes = torch.tensor([labels[i] for i in ids])
                hits += class_accuracy(images, classes, self.judge) * len(ids)
        scores = self.fidelity.compute()
        if self.judge is not None:
            scores["class_accuracy"] = hits / num_samples
        return scores

    def score_reconstructions(self, tokenizer: VQVAE) -> dict[str, float]:
        """What the judge finds right of validation images and of their reconstructions."""
        if self.judge is None:
            return {}
        real, rebuilt, count = 0.0, 0.0, 0
        for images, labels in _batches(self.source, self.source.val, self.batch_size):
            decoded = _rebuild(tokenizer, images)[-1]
            real += class_accuracy(images.add(1).div(2), labels, self.judge) * len(labels)
            rebuilt += class_accuracy(decoded, labels, self.judge) * len(labels)
            count += len(labels)
        return {"class_accuracy_real": real / count, "class_accuracy": rebuilt / count}

    # -- at the end of a stage ------------------------------------------------------------

    def conclude_tokenizer(self, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `reconstructions.png` and return the scores of reconstructions."""
        picture = self.reconstruction_picture(tokenizer, num_images=12)
        save_png(picture, folder / "reconstructions.png")
        return self.score_reconstructions(tokenizer)

    def conclude_var(self, transformer: VAR, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `grid.png` and `coarse_to_fine.png` and return the scores of samples."""
        drawn = self.draw_per_class(transformer, tokenizer, num_per_class=10)
        save_png(drawn.grid, folder / "grid.png")
        save_png(drawn.strip, folder / "coarse_to_fine.png")
        return self.score_samples(transformer, tokenizer, self.num_samples)

    # -- pictures -------------------------------------------------------------------------

    def draw_per_class(self, transformer: VAR, tokenizer: VQVAE, num_per_class: int) -> Drawn:
        """A row of samples for each of the first classes, and one of each scale by scale."""
        num_rows = min(max(1, self.source.num_classes), MAX_ROWS)
        labels = [i % num_rows for i in range(num_per_class * num_rows)]
        drawn = [samples for _, samples in self._draw(transformer, tokenizer, labels)]
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
        images, _ = next(iter(_batches(self.source, self.source.val, num_images)))
        rebuilt = _rebuild(tokenizer, images)
        return reconstructions(images.add(1).div(2), rebuilt, tokenizer.schedule.sizes)

    # -- parts ----------------------------------------------------------------------------

    def _draw(self, transformer: VAR, tokenizer: VQVAE, labels: list[int]):
        return iterate_samples(
            transformer,
            tokenizer,
            labels,
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


def _batches(
    source: Any, dataset: Any, size: int, limit: int | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) in [-1, 1] and labels (B,), in order, or of `limit` drawn ones."""
    chosen = range(len(dataset))
    if limit is not None and limit < len(dataset):
        # Not the first ones: sets on disk are often sorted by class.
        chosen = np.random.default_rng(0).permutation(len(dataset))[:limit].tolist()
    for start in range(0, len(chosen), size):
        items = [dataset[i] for i in chosen[start : start + size]]
        images = torch.stack([source.val_transform(image) for image, _ in items])
        yield images, torch.tensor([label for _, label in items])


@torch.no_grad()
def _rebuild(tokenizer: VQVAE, images: Tensor) -> list[Tensor]:
    """Reconstructions after each scale, in [0, 1], on the CPU."""
    device = next(tokenizer.parameters()).device
    decoded = tokenizer.decode(tokenizer.encode(images.to(device)), per_scale=True)
    return [x.add(1).div(2).cpu() for x in decoded]
