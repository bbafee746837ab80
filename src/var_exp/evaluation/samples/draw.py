"""Drawing the samples of a set, and seeing them for scores, by whoever shares the work.

n samples of a batch, K scales
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from var_exp.evaluation.samples.sample_set import Job, SampleSet
from var_exp.evaluation.scorer import SampleScorer
from var_exp.sampling.generate import Samples, check_settings, evaluating, iterate_samples
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR
from var_exp.visualization.images import class_grid, coarse_to_fine, reconstructions, to_uint8

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
        settings: how samples are drawn; arguments of `var_exp.sampling.generate.generate`.
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


SETTINGS = ("cfg_scale", "top_k", "top_p", "temperature", "seed")
PRECISIONS = {"32-true": False, "bf16-mixed": True}  # and whether that is autocast's work


def make_plan(
    transformer: VAR,
    tokenizer: VQVAE,
    classes: str | Sequence[int] | None,
    precision: str,
    settings: dict[str, Any],
    compiled: bool = False,
) -> dict[str, Any]:
    """What decides every sample of a set, as plain data.

    Args:
        classes: that take turns; "all" of them, or None for samples without a class.
        precision: of the networks, "32-true" or "bf16-mixed".
        settings: cfg_scale, top_k, top_p, temperature and seed, as in `generate`.
        compiled: whether the networks are, which rounds in another way.

    Raises:
        ValueError: a value out of its range.
    """
    check_settings(**settings)
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision: expected {' or '.join(PRECISIONS)}, got {precision!r} (precision=...)"
        )
    return {
        "networks": {"transformer": fingerprint(transformer), "tokenizer": fingerprint(tokenizer)},
        "image_size": list(tokenizer.image_size),
        "classes": _choose_classes(classes, transformer.num_classes),
        "precision": precision,
        **({"compiled": True} if compiled else {}),  # sets without it are of before it was there
        **settings,
    }


def _choose_classes(classes: str | Sequence[int] | None, num_classes: int) -> list[int]:
    if classes is None or num_classes == 0:
        return [num_classes]  # which stands for no class
    asked = range(num_classes) if classes == "all" else classes
    listed = isinstance(asked, Sequence) and not isinstance(asked, str) and len(asked) > 0
    if not listed or any(type(c) is not int or not 0 <= c < num_classes for c in asked):
        raise ValueError(
            f"classes: expected a list of numbers in 0..{num_classes - 1}, all or null, got {asked}"
        )
    return list(asked)


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits that change with any weight of a recorded network, or its form."""
    digest = hashlib.sha256(json.dumps(network.spec, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Drawer(NamedTuple):
    """What draws the samples of a plan, and sees them for scores where there is a scorer."""

    transformer: VAR
    tokenizer: VQVAE
    plan: dict[str, Any]
    scorer: SampleScorer | None = None

    def computing(self) -> torch.autocast:
        """A context in which networks compute in the plan's precision."""
        device = next(self.tokenizer.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, PRECISIONS[self.plan["precision"]])

    def draw(self, ids: Sequence[int]) -> Samples:
        """The samples with these numbers, in one batch."""
        networks, settings = (self.transformer, self.tokenizer), {k: self.plan[k] for k in SETTINGS}
        batch = {"sample_ids": ids, "batch_size": len(ids)}
        with self.computing():
            ((_, drawn),) = iterate_samples(*networks, self._labels(ids), **batch, **settings)
        return drawn

    def see(self, ids: Sequence[int], samples: Samples) -> dict[str, Tensor]:
        """What scores need of samples; also after each scale, where they have indices."""
        labels, per_scale = torch.tensor(self._labels(ids)), bool(samples.indices)
        with self.computing():
            return self.scorer.see(self.tokenizer, samples, labels, per_scale)

    def _labels(self, ids: Sequence[int]) -> list[int]:
        classes = self.plan["classes"]
        return [classes[i % len(classes)] for i in ids]


def fill(
    samples: SampleSet,
    jobs: list[Job],
    drawer: Drawer,
    rank: int,
    size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Do every size-th job from the rank-th; the first process shows how far all have come.

    Args:
        on_batch: called before each job; it may end the work.
    """
    num_left = sum(len(job.ids) for job in jobs)
    done = {"initial": samples.num_samples - num_left, "total": samples.num_samples}
    hidden = True if rank else None  # None: shown on a terminal
    with tqdm(desc="sampling", unit="image", disable=hidden, **done) as bar:
        for start in range(0, len(jobs), size):
            together = jobs[start : start + size]
            on_batch()
            for job in together[rank : rank + 1]:
                samples.fill(job, drawer.draw, drawer.see)
            bar.update(sum(len(job.ids) for job in together))
