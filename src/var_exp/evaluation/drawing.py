"""Samples and reconstructions of models of one source of images, as pictures.

n samples, K scales, (H, W, C) an image
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from var_exp.evaluation.pictures import class_grid, coarse_to_fine, reconstructions, to_uint8
from var_exp.sampling import Samples, evaluating, iterate_samples
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

MAX_ROWS = 20  # classes that a picture of samples shows


class Drawn(NamedTuple):
    """grid, strip: uint8 (H, W, 3) pictures of samples by class, and scale by scale.

    steps: uint8 (K, n, H, W, C), a sample of each class after each scale.
    """

    grid: np.ndarray
    strip: np.ndarray
    steps: np.ndarray


class Drawing:
    """Draws from models of one source.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up.
        settings: how samples are drawn; arguments of `var_exp.sampling.generate`.
        batch_size: samples at once.
        seed: of the samples.
    """

    def __init__(self, source: Any, settings: dict[str, Any], batch_size: int, seed: int):
        self.source, self.settings = source, settings
        self.batch_size, self.seed = batch_size, seed

    def label(self, sample_id: int) -> int:
        """Every class equally often, in turn; "no class" (0) where there are none."""
        return sample_id % max(1, self.source.num_classes)

    def draw(
        self,
        transformer: VAR,
        tokenizer: VQVAE,
        ids: list[int] | None,
        labels: list[int] | None = None,
    ) -> Iterable[tuple[list[int], Samples]]:
        """Samples of numbers, or of labels, a batch at a time."""
        if labels is None:
            labels = [self.label(i) for i in ids]
        return labels and iterate_samples(
            transformer,
            tokenizer,
            labels,
            sample_ids=ids,
            batch_size=self.batch_size,
            seed=self.seed,
            **self.settings,
        )

    def draw_per_class(self, transformer: VAR, tokenizer: VQVAE, num_per_class: int) -> Drawn:
        """A row of samples for each of the first classes, and one of each scale by scale."""
        num_rows = min(max(1, self.source.num_classes), MAX_ROWS)
        labels = [i % num_rows for i in range(num_per_class * num_rows)]
        drawn = [samples for _, samples in self.draw(transformer, tokenizer, None, labels)]
        images = torch.cat([samples.images for samples in drawn]).cpu()
        codes = [
            torch.cat(scale)[:num_rows] for scale in zip(*(s.indices for s in drawn), strict=True)
        ]
        steps = [x.add(1).div(2).cpu() for x in tokenizer.decode(codes, per_scale=True)]
        names = list(self.source.class_names)
        return Drawn(
            class_grid(images, torch.tensor(labels), names, columns=num_per_class),
            coarse_to_fine(steps, tokenizer.schedule.sizes, names[:num_rows]),
            to_uint8(torch.stack(steps)).permute(0, 1, 3, 4, 2).numpy(),
        )

    def reconstruction_picture(self, tokenizer: VQVAE, num_images: int) -> np.ndarray:
        """The first validation images, and what each scale makes of them: uint8 (H, W, 3)."""
        images, _ = load(self.source, self.source.val, range(num_images))
        rebuilt = rebuild(tokenizer, images, per_scale=True)
        return reconstructions(images.add(1).div(2), rebuilt, tokenizer.schedule.sizes)


def device_of(network: VQVAE) -> torch.device:
    return next(network.parameters()).device


def load(source: Any, dataset: Any, chosen: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [-1, 1] and labels (B,)."""
    items = [dataset[int(i)] for i in chosen if i < len(dataset)]
    images = torch.stack([source.val_transform(image) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


@torch.no_grad()
def rebuild(tokenizer: VQVAE, images: Tensor, per_scale: bool = False) -> Tensor | list[Tensor]:
    """Reconstructions in [0, 1], on the CPU; with `per_scale` those after each scale."""
    with evaluating(tokenizer):
        indices = tokenizer.encode(images.to(device_of(tokenizer)))
        if per_scale:
            return [x.add(1).div(2).cpu() for x in tokenizer.decode(indices, per_scale=True)]
        return tokenizer.decode(indices).add(1).div(2).cpu()
