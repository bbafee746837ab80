"""Sets of samples: as sample.py leaves them, or drawn in small from tiny networks."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from helpers.command import files, run
from helpers.tiny import tiny_tokenizer, tiny_transformer
from var_exp.evaluation import FeatureNetwork, Features
from var_exp.evaluation.sampler import Sampler
from var_exp.evaluation.samples.sample_set import SampleSet

# A set in three batches, of which the first two are scored after each scale.
SCORED = ["evaluate=true", "num_samples=40", "batch_size=16", "evaluation.num_samples_per_scale=20"]
OF_RUN = (".hydra", "environment.json")  # when and how it was run
SETTINGS = {"cfg_scale": 1.5, "top_k": 0, "top_p": 0.0, "temperature": 1.0, "seed": 0}
NAMES = ["a", "b", "c"]  # of the classes of the tiny networks


class Killed(BaseException):
    """What a kill looks like from within a test: nothing catches it."""


def draw(ckpt: Path, out: Path, *overrides: str) -> dict[str, bytes]:
    """Run sample.py on a run folder; what it leaves, but for what tells of the run itself."""
    references = f"runs_dir={ckpt.parent.parent}"
    done = run("sample", f"ckpt={ckpt}", f"out_dir={out}", references, *overrides)
    assert done.code == 0, done.err
    return left_in(out)


def left_in(out: Path) -> dict[str, bytes]:
    return {k: v for k, v in files(out).items() if not k.startswith(OF_RUN)}


def count_calls(monkeypatch, owner: Any, name: str) -> list[tuple]:
    """The arguments of each call of a function from here on."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    return calls


def tiny_sampler(weights: int = 0, classes="all", precision="32-true", **settings) -> Sampler:
    """Of tiny networks; other weights are other networks."""
    torch.manual_seed(weights)
    pair = tiny_transformer(), tiny_tokenizer()
    return Sampler(*pair, classes, SETTINGS | settings, precision)


def make_set(folder: Path, sampler: Sampler, num_samples: int, **options) -> SampleSet:
    return SampleSet(folder, sampler.plan(), num_samples, **{"batch_size": 8} | options)


def complete(
    samples: SampleSet, sampler: Sampler, scorer: Any | None = None
) -> tuple[str | None, list[int]]:
    """Begin, draw and finish a set, as sample.py does: what it says, and the numbers it draws."""
    line, missing = samples.begin(), samples.missing()
    for batch in missing:
        samples.fill(batch, sampler, scorer)
    samples.finish(sampler, NAMES)
    samples.clear()
    return line, [i for batch in missing if batch.draw for i in batch.ids]


class Means(FeatureNetwork):
    """Sees the means of the quarters of an image, whatever its size: a network of the user's."""

    def __init__(self):
        super().__init__("means", 4)

    def extract(self, pixels):
        grey = pixels.float().mean(dim=1, keepdim=True) / 255
        return Features(adaptive_avg_pool2d(grey, 2).flatten(1), None)


def means(path: Path, source: Any) -> Means:
    """What `evaluation.network` may name."""
    return Means()
