"""What is measured and drawn of a model in training and at its end.

Scores are shared work: each process draws and sees every n-th image, and all of them must call.
Features are brought into the order of the images before anything is summed, so that the
figures do not depend on the number of processes. Pictures are drawn by whoever asks.

    B batch, N samples, K scales
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_exp.distributed.collectives import common_batches, is_main_process, share
from var_exp.evaluation import protocol
from var_exp.evaluation.metrics import ScoreSettings, scores
from var_exp.evaluation.neighbours import nearest, neighbours_picture
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features
from var_exp.evaluation.reference import Reference
from var_exp.evaluation.sampler import Sampler, device_of
from var_exp.evaluation.scorer import RealImages, scores_against
from var_exp.io.files import atomic_write
from var_exp.sampling.generate import evaluating, round_up
from var_exp.sampling.labels import take_turns
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR
from var_exp.visualization.images import (
    class_grid,
    coarse_to_fine,
    reconstructions,
    save_png,
    to_uint8,
)

NUM_NEIGHBOURS = 5  # training images beside each sample
PRECISION = "32-true"  # of all networks while they are measured here
MAX_ROWS = 20  # classes that a picture of samples shows


class ClassPictures(NamedTuple):
    """grid, strip: uint8 (H, W, 3) pictures of samples by class, and scale by scale.

    steps: uint8 (K, n, H, W, C), a sample of each class after each scale.
    """

    grid: np.ndarray
    strip: np.ndarray
    steps: np.ndarray


class Evaluator:
    """Scores and pictures of models of one source of images.

    `on_batch` is called after each batch of what is scored, or read as a reference, by all
    processes equally often: who waits for the end of a long evaluation may end it there.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up.
        network: the features in which samples are compared with real images.
        settings: how samples are drawn; arguments of `var_exp.sampling.generate.generate`.
        num_samples: how many the final scores are measured on.
        num_samples_per_scale: how many of them are scored after each scale too.
        batch_size: samples at once.
        seed: of the samples.
        reference, num_reference, cache: see `RealImages`.
        score_settings: of the scores.

    Raises:
        ValueError: a reference that is missing or does not fit.
    """

    def __init__(
        self,
        source: Any,
        network: FeatureNetwork,
        settings: dict[str, Any],
        *,
        num_samples: int = 500,
        num_samples_per_scale: int = 0,
        batch_size: int = 100,
        seed: int = 0,
        reference: str | Path | None = None,
        num_reference: int = 10_000,
        cache: str | Path | None = None,
        score_settings: ScoreSettings | None = None,
    ):
        self.source, self.network, self.settings = source, network, settings
        self.batch_size, self.seed = batch_size, seed
        self.num_samples, self.num_samples_per_scale = num_samples, num_samples_per_scale
        self.on_batch: Callable[[], None] = lambda: None
        self.score_settings = score_settings or ScoreSettings()
        self.classes = range(max(1, source.num_classes))  # 0 is "no class" where there are none
        self.real = RealImages(
            network,
            source,
            source.image_size,
            file=reference,
            num_reference=num_reference,
            batch_size=batch_size,
            cache=cache,
        )
        self.real.on_batch = lambda: self.on_batch()

    def sampler(self, transformer: VAR, tokenizer: VQVAE, classes: range | None = None) -> Sampler:
        """Draws samples as they are scored: the classes of the source take turns."""
        settings = self.settings | {"seed": self.seed}
        return Sampler(transformer, tokenizer, classes or self.classes, settings, PRECISION)

    # -- scores ---------------------------------------------------------------------------

    def score_samples(
        self, transformer: VAR, tokenizer: VQVAE, num_samples: int, num_per_scale: int = 0
    ) -> dict[str, float]:
        """All scores of fresh samples; of the first `num_per_scale` also the FID by scale."""
        scorer = self.real.scorer(tokenizer, self.score_settings)
        sampler, num_per_scale = (
            self.sampler(transformer, tokenizer),
            min(num_per_scale, num_samples),
        )
        split = ((range(num_per_scale), True), (range(num_per_scale, num_samples), False))
        # None: hidden off a terminal.
        hidden = None if is_main_process() else True
        total = len(share(num_samples))
        with tqdm(total=total, desc="scoring samples", leave=False, disable=hidden) as bar:
            for numbers, per_scale in split:
                ids = [i for i in share(num_samples) if i in numbers]
                batches = sampler.batches(ids, self.batch_size)
                for batch, (batch_ids, samples) in enumerate(batches):
                    labels = torch.tensor(sampler.labels(batch_ids))
                    features = scorer.extract_features(tokenizer, samples, labels, per_scale)
                    scorer.update(torch.tensor(batch_ids), features)
                    bar.update(len(batch_ids))
                    if batch < common_batches(len(numbers), round_up(self.batch_size)):
                        self.on_batch()
        return scorer.compute()

    def score_reconstructions(
        self, tokenizer: VQVAE, num_images: int | None = None
    ) -> dict[str, float]:
        """How close reconstructions of validation images come to them.

        All scores against the very images they are made of, `rfid_<network>[_<crop>]` and so on;
        and the class accuracy of both.

        Args:
            num_images: how many validation images, drawn evenly; all of them for None.
        """
        device = device_of(tokenizer)
        reference = self.real.held_out(num_images, device)
        numbers = reference.indices or []  # which those of a source have
        bank, hits = FeatureBank().to(device), FeatureBank().to(device)
        classifier, rows = self.real.classifier, share(len(numbers))
        for batch, start in enumerate(range(0, len(rows), self.batch_size)):
            ids = torch.tensor(rows[start : start + self.batch_size])
            chosen = [numbers[i] for i in ids]
            images, labels = load(self.source, self.source.val, chosen)
            reconstructed = reconstruct(tokenizer, images)
            bank.update(self.network(reconstructed), ids)
            if classifier:
                classes = [classifier[1](x) for x in (images, reconstructed.mul(2).sub(1))]
                right = torch.stack([(x == labels).float() for x in classes], dim=1)  # (B, 2)
                hits.update(Features(right, None), ids)
            if batch < common_batches(len(numbers), self.batch_size):
                self.on_batch()
        found = {}
        if len(numbers) > 1:  # FID needs at least two images
            name = "_".join(filter(None, (self.network.name, self.source.crop)))
            only = scores_against(reference, self.score_settings)
            found = scores(bank.compute(), reference, name, self.score_settings, only)
            found = {f"r{key}": value for key, value in found.items()}
        if classifier:
            real, reconstructed = hits.compute().features.mean(dim=0).tolist()
            found[f"class_accuracy_real_{classifier[0]}"] = real
            found[f"class_accuracy_{classifier[0]}"] = reconstructed
        return found

    # -- at the end of a stage ------------------------------------------------------------

    def conclude_tokenizer(self, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `reconstructions.png` and return the scores of reconstructions."""
        if is_main_process():
            picture = self.reconstruction_picture(tokenizer, num_images=12)
            save_png(picture, folder / "reconstructions.png")
        return self.score_reconstructions(tokenizer)

    def conclude_var(self, transformer: VAR, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write pictures of samples and return their scores.

        `grid.png`, `coarse_to_fine.png` and the same as arrays in `steps.npz`, and
        `neighbours.png`: the nearest training images beside each sample.
        """
        found = self.score_samples(
            transformer, tokenizer, self.num_samples, self.num_samples_per_scale
        )
        if is_main_process():
            pictures = self.draw_per_class(transformer, tokenizer, num_per_class=10)
            save_png(pictures.grid, folder / "grid.png")
            save_png(pictures.strip, folder / "coarse_to_fine.png")
            with atomic_write(folder / "steps.npz") as unfinished:
                names = np.array(self.source.class_names[:MAX_ROWS], dtype=str)
                np.savez_compressed(unfinished, arr_0=pictures.steps, names=names)
            picture = self.neighbour_picture(transformer, tokenizer)
            if picture is not None:
                save_png(picture, folder / "neighbours.png")
        return found

    def protocol_of_samples(self, tokenizer: VQVAE, weights: str) -> dict[str, Any]:
        """How the final scores of samples are obtained; `weights`: "averaged" or "raw"."""
        return protocol.of_samples(
            take_turns(self.classes, range(self.num_samples)),
            tokenizer.schedule,
            self.settings,
            seed=self.seed,
            precision=PRECISION,
            weights=weights,
            image_size=self.source.image_size,
        ) | self._protocol_of_scores(self.real.reference(device_of(tokenizer)))

    def protocol_of_reconstructions(self, tokenizer: VQVAE, weights: str) -> dict[str, Any]:
        """How the final scores of reconstructions are obtained."""
        return protocol.of_reconstructions(
            len(self.source.val),
            precision=PRECISION,
            weights=weights,
            image_size=self.source.image_size,
            crop=self.source.crop,
        ) | self._protocol_of_scores(self.real.held_out(None, device_of(tokenizer)))

    def _protocol_of_scores(self, reference: Reference) -> dict[str, Any]:
        return protocol.of_scores(self.network, reference, self.score_settings)

    # -- pictures -------------------------------------------------------------------------

    def draw_per_class(
        self, transformer: VAR, tokenizer: VQVAE, num_per_class: int
    ) -> ClassPictures:
        """A row of samples for each of the first classes, and one of each scale by scale."""
        sampler = self.sampler(transformer, tokenizer, self.classes[:MAX_ROWS])
        num_rows = len(sampler.classes)
        ids = range(num_per_class * num_rows)
        drawn = [samples for _, samples in sampler.batches(ids, self.batch_size)]
        images = torch.cat([samples.images for samples in drawn]).cpu()
        codes = [
            torch.cat(scale)[:num_rows] for scale in zip(*(s.indices for s in drawn), strict=True)
        ]
        steps = [x.add(1).div(2).cpu() for x in tokenizer.decode(codes, per_scale=True)]
        names = list(self.source.class_names)
        return ClassPictures(
            class_grid(images, torch.tensor(sampler.labels(ids)), names, columns=num_per_class),
            coarse_to_fine(steps, tokenizer.schedule.sizes, names[:num_rows]),
            to_uint8(torch.stack(steps)).permute(0, 1, 3, 4, 2).numpy(),
        )

    def reconstruction_picture(self, tokenizer: VQVAE, num_images: int) -> np.ndarray:
        """The first validation images, and what each scale makes of them: uint8 (H, W, 3)."""
        images, _ = load(self.source, self.source.val, range(num_images))
        reconstructed = reconstruct_per_scale(tokenizer, images)
        return reconstructions(images.add(1).div(2), reconstructed, tokenizer.schedule.sizes)

    def neighbour_picture(self, transformer: VAR, tokenizer: VQVAE) -> np.ndarray | None:
        """The nearest training images beside one sample of each class: uint8 (H, W, 3).

        None where the reference is no part of the training images.
        """
        reference = self.real.reference(device_of(tokenizer))
        if reference.indices is None or reference.features is None:
            return None
        ids = range(min(len(self.classes), 10))
        batches = self.sampler(transformer, tokenizer).batches(ids, self.batch_size)
        samples = torch.cat([s.images for _, s in batches]).cpu()
        k = min(NUM_NEIGHBOURS, len(reference.indices))
        features = self.network(samples).features.cpu()
        distances, rows = nearest(features, reference.features, k)
        chosen = [reference.indices[i] for i in rows.flatten().tolist()]
        images, _ = load(self.source, self.source.train, chosen)
        images = images.add(1).div(2).unflatten(0, (len(ids), k))  # (n, k, C, H, W)
        return neighbours_picture(samples, images, distances)


def load(source: Any, dataset: Any, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) in [-1, 1] and labels (B,)."""
    items = [dataset[int(i)] for i in indices if i < len(dataset)]
    images = torch.stack([source.val_transform(image) for image, _ in items])
    return images, torch.tensor([label for _, label in items])


@torch.no_grad()
def reconstruct(tokenizer: VQVAE, images: Tensor) -> Tensor:
    """Reconstructions in [0, 1], on the CPU."""
    with evaluating(tokenizer):
        indices = tokenizer.encode(images.to(device_of(tokenizer)))
        return tokenizer.decode(indices).add(1).div(2).cpu()


@torch.no_grad()
def reconstruct_per_scale(tokenizer: VQVAE, images: Tensor) -> list[Tensor]:
    """Those after each scale."""
    with evaluating(tokenizer):
        indices = tokenizer.encode(images.to(device_of(tokenizer)))
        return [x.add(1).div(2).cpu() for x in tokenizer.decode(indices, per_scale=True)]
