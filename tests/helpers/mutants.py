"""Mutants of configurations: what `python train.py KEY=VALUE` and `sample.py` may be told.

Each is run as the command line runs it, within this process, up to where training would begin:
networks, optimizers, callbacks and loggers are made, nothing is trained. Samples are drawn.
"""

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from helpers.command import QUICK, ROOT, composed_with_hydra, run, run_for_real
from var_exp.experiment.config.validate import check_types
from var_exp.experiment.entry import errors_in_one_line
from var_exp.experiment.run import Run
from var_exp.training.encode import EncodingStage
from var_exp.training.fit import TrainingStage, quiet

sys.path.insert(0, str(ROOT))  # train.py and sample.py are importable

WORDS = (
    *("abc", "''", "true", "false", "yes", "null", "nan", "inf", "-inf", "raw", "all"),
    *("-1", "0", "1", "2", "3", "4", "0.5", "-0.5", "1.5", "7", "1e30", "-1e30", "1000000000000"),
    *(
        "[]",
        "[1,2]",
        "[0.5]",
        "[abc]",
        "[null]",
        "[[1]]",
        "{}",
        "{a:1}",
        "{_target_:nowhere.at.all}",
    ),
    *(
        "{_target_:var_exp.data.Digits}",
        "{_target_:builtins.dict}",
        "{first:2}",
        "[encoder,codebook]",
    ),
    *("99999999999999999999", "'${nothing}'", "'${seed}'", "ä", "a/b", "/dev/null", "2024"),
)
TRAIN = {
    "digits": [],
    "shapes": ["data=shapes", "data.num_train=64", "data.num_val=32"],
    "patchgan": ["adversary=patchgan", "adversary.discriminator.num_layers=1"],
    "fsq": ["tokenizer=tiny_fsq"],
    "bsq": ["tokenizer=tiny_bsq"],
    "progressive": [
        "+model.var.progressive._target_=var_exp.training.progressive.ProgressiveScales",
        "+model.var.progressive.first=2",
        "+model.var.progressive.until=0.5",
        "model.var.scale_weights=[1,1,1,1]",
    ],
    "tensorboard": ["logger=tensorboard"],
}
SAMPLE = {
    "plain": [],
    "scored": ["evaluate=true", "evaluation.num_samples=8", "evaluation.num_samples_per_scale=4"],
}
DEEP = 40  # of so many mutants of a training, one trains


class Mutant(NamedTuple):
    """What is wrong, what feeds it to the product, and what a refusal must name, one of them.

    folder: what must not hold anything new after a refusal, nor ever an unfinished file.
    """

    what: str
    feed: Callable[[], object]
    named: tuple[str, ...]
    folder: Path


class Ready(Exception):
    """Everything is made: training would begin."""


def configurations(draw: random.Random, place: Path, trained: Path, real: float = 0.0) -> Mutant:
    """A composition with one or two values that are something else.

    Args:
        place: an empty folder.
        trained: a run folder.
        real: the share that is run by a process of its own.
    """
    program = draw.choice(["train", "train", "train", "sample"])
    bases = {"train": TRAIN, "sample": SAMPLE}[program]
    base = bases[draw.choice(sorted(bases))]
    if program == "train":
        own = [*QUICK, f"runs_dir={place}/out", f"run_dir={place}/out/run"]
    else:
        own = [f"ckpt={trained}", "num_samples=4", f"out_dir={place}/out", f"runs_dir={place}"]
    options = [*own, *base]
    with composed_with_hydra(program, place / "out", *options) as cfg:
        keys = keys_of(OmegaConf.to_container(OmegaConf.masked_copy(cfg, of_ours(cfg))))
    wrong = [mutated(draw, *draw.choice(keys)) for _ in range(draw.choice([1, 1, 1, 2]))]
    names = [key for override in wrong for key in names_of(override)]
    shared = program == "sample" and any("devices" in key for key in names)  # starts processes
    if draw.random() < real or shared:
        feed = lambda: really(program, place, [*options, *wrong])  # noqa: E731
    elif program == "train" and draw.random() < 1 / DEEP:
        feed = lambda: speak(run("train", *options, *wrong))  # noqa: E731
    else:
        feed = lambda: within(program, place, options, wrong)  # noqa: E731
    return Mutant(f"{program} {' '.join([*base, *wrong])}", feed, tuple(names), place / "out")


def of_ours(cfg: DictConfig) -> list[str]:
    places = ("run_dir", "runs_dir", "out_dir", "ckpt", "hydra", "check")
    return [key for key in cfg if key not in places]


def keys_of(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """All dotted keys, of parts and of what is in them, with their values."""
    found = []
    for name, value in tree.items():
        if "/" in str(name):
            continue  # metrics of `expected`: Hydra has no override for them
        found.append((prefix + name, value))
        if isinstance(value, dict):
            found += keys_of(value, f"{prefix}{name}.")
    return found


def mutated(draw: random.Random, key: str, value: Any) -> str:
    """An override of a key with something else, of the same type or of another."""
    kind = draw.random()
    if kind < 0.05:
        return f"~{key}"
    if kind < 0.1:
        return f"+{key}_{draw.choice('xyz')}={draw.choice(WORDS)}"
    if kind < 0.4 and type(value) in (int, float) and value:
        return f"{key}={value * draw.choice([-1, 0.1, 10, 1000, 0.5, 2])}"
    if kind < 0.4 and isinstance(value, str) and value.isidentifier():
        place = draw.randrange(len(value))
        return f"{key}={value[:place]}x{value[place + 1 :]}"
    return f"{key}={draw.choice(WORDS)}"


def names_of(override: str) -> list[str]:
    """What a message may call the key: itself or any of its words but the most common."""
    key = override.lstrip("~+").partition("=")[0]
    return [key, *(word for word in key.split(".") if word not in ("model", "module"))]


def within(program: str, place: Path, options: list[str], wrong: list[str]) -> None:
    """As the command line, but for what Hydra does, and up to the training."""
    import sample
    import train

    with composed_with_hydra(program, place / "out", *options) as cfg:
        for override in OverridesParser.create().parse_overrides(wrong):
            change(cfg, override)
        alone = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        if program == "sample":
            run = Run(place / "out", alone)
            with errors_in_one_line(run):
                check_types(alone)
                sample.sample(alone, run)
            return
        run = Run(place / "out" / "run", alone)
        with contextlib.suppress(Ready), up_to_training(), errors_in_one_line(run):
            check_types(alone)
            train.train(alone, run)


def change(cfg: DictConfig, override) -> None:
    """What Hydra makes of an override."""
    key = override.key_or_group
    with open_dict(cfg):
        if override.is_delete():
            parent, _, name = key.rpartition(".")
            del (OmegaConf.select(cfg, parent) if parent else cfg)[name]
        else:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)


@contextlib.contextmanager
def up_to_training() -> Iterator[None]:
    """Raise `Ready` once everything is made that the stages take."""

    def make_all(stage, evaluator):
        callbacks = [
            c(evaluator) if isinstance(c, functools.partial) else c for c in stage.callbacks
        ]
        with quiet():
            stage.trainer(logger=[], callbacks=callbacks)
        for logger in stage.loggers:
            logger(save_dir=str(stage.run_dir), version=stage.name)
        stage.module.make_optimizers()
        stage.module.schedule(0.5)

    def ready(run, images):
        raise Ready

    with (
        mock.patch.object(TrainingStage, "run", make_all),
        mock.patch.object(EncodingStage, "run", lambda stage, evaluator: None),
        mock.patch.object(Run, "finish", ready),
    ):
        yield


def really(program: str, place: Path, arguments: list[str]) -> None:
    """In a process of its own."""
    cwd = place / "cwd"
    cwd.mkdir()
    speak(run_for_real(program, *arguments, cwd=cwd))


def speak(done) -> None:
    """Raise what a program ended with."""
    if "Traceback" in done.err or done.code not in (0, 1):
        raise AssertionError(f"exit {done.code}: {done.err[-3000:]}")
    if done.code == 1:
        lines = [line for line in done.err.splitlines() if line.startswith("error:")]
        told = lines or [line for line in done.err.splitlines() if line.strip()]
        raise SystemExit(" ".join(told[:3]))
