"""A job as the check sees it: how its parts are made, and the values that decide what it takes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from var_exp.data import ImageDataModule, ImageSource, TokenCache
from var_exp.tokenizer import VQVAE
from var_exp.training.module import StageModule
from var_exp.transformer import VAR


class Job(NamedTuple):
    """Every callable raises ValueError for a user's mistake, as in the run itself.

    choices: checks that need nothing else.
    files: by its key in the configuration, what makes a part that is read from a file.
    source: the images, not set up.
    tokenizer: that of the run, from where it is read.
    new_tokenizer: one from the configuration, in its place where it cannot be read.
    transformer: for images and a tokenizer.
    module: of a stage, from its networks, without parts of `files` that could not be made.
    course: of a stage, the arguments that `check_stage` takes.
    check_stage: whether a run folder can be gone on with.
    trainer: arguments of the Trainer; `strategy` a name, or a mapping with a `_target_`.
    loggers: by their names.
    places: folders that are written to, the run folder first; they need not exist yet.
    cache: the files of codes, for images and a tokenizer.
    samples: drawn at once in validation.
    seed, num_workers: of the images that are looked at.
    everything: look at all images, however long it takes.
    """

    stages: Sequence[str]
    choices: Sequence[Callable[[], object]]
    files: Mapping[str, Callable[[], object]]
    source: Callable[[], ImageSource]
    tokenizer: Callable[[ImageSource], VQVAE]
    new_tokenizer: Callable[[ImageSource], VQVAE]
    transformer: Callable[[ImageSource, VQVAE], VAR]
    module: Callable[[str, Mapping[str, nn.Module], Collection[str]], StageModule]
    course: Callable[[str, Any], dict[str, Any]]
    check_stage: Callable[..., object]
    trainer: Mapping[str, Any]
    loggers: Mapping[str, Any]
    places: Sequence[Path]
    cache: Callable[[ImageDataModule, VQVAE], TokenCache]
    samples: int
    seed: int
    num_workers: int
    everything: bool
