"""Drawing the samples of a set, and seeing them for scores, by whoever shares the work.

n samples of a batch, K scales
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from var_exp.evaluation.sample_set import Job, SampleSet
from var_exp.evaluation.scorer import SampleScorer
from var_exp.sampling import Samples, check_settings, iterate_samples
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

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
