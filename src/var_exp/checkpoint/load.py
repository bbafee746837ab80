"""Networks from whatever holds them.

    a run folder, one of its stages, a .ckpt       what train.py writes (`checkpoint.py`)
    a folder with config.json                      a portable one (`pipeline.py`)
    a .pth                                         a published file (`official/`)

Which of these a path is shows in what lies there, not in how it is called.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from var_exp.checkpoint.checkpoint import KEY, check_weights, find_checkpoint, load_networks
from var_exp.checkpoint.official import find_official, load_official, read_official
from var_exp.checkpoint.pipeline import CONFIG, VARPipeline
from var_exp.io.files import read_tensors
from var_exp.scales import Side
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

Tokenizer = TypeVar("Tokenizer", bound=VQVAE | None)
Transformer = TypeVar("Transformer", bound=VAR | None)


class Found(NamedTuple, Generic[Tokenizer, Transformer]):
    """What a path holds; None for the network that it does not.

    class_names: of the transformer's classes, "0", "1", ... where nothing says them.
    path: the file, or portable folder, that was read.
    weights: which they are: "averaged" or "raw", "exported" or "published" where nothing says.
    """

    tokenizer: Tokenizer
    transformer: Transformer
    class_names: tuple[str, ...]
    path: Path
    weights: str


AnyFound = Found[VQVAE | None, VAR | None]


def read_networks(
    path: str | os.PathLike,
    weights: str | None = None,
    *,
    patch_nums: Sequence[Side] | None = None,
    stages: Sequence[str] = ("var", "tokenizer"),
    key: str = "ckpt",
) -> AnyFound:
    """Read the networks of a path, whatever holds them, in evaluation mode, on the CPU.

    Args:
        weights: "averaged" or "raw", where a checkpoint of ours has both; None takes those that
            its run was told to hand on.
        patch_nums: the schedule of a published tokenizer, whose file says none.
        stages: of a run folder, in the order in which their checkpoints are looked for.
        key: what the path is called in the configuration.

    Raises:
        ValueError: an unknown `weights`; or the path is missing, damaged, holds code or
            something else, in one line with the path and the key.
    """
    check_weights(weights)
    path = Path(str(path))  # a folder may be called 2024, which Hydra reads as a number
    try:
        return _read(path, weights, patch_nums, stages)
    except ValueError as error:
        raise ValueError(f"{error} ({key}={path})") from None


def _read(
    path: Path, weights: str | None, patch_nums: Sequence[Side] | None, stages: Sequence[str]
) -> AnyFound:
    if not path.exists():
        raise ValueError(
            f"checkpoint: no checkpoint at {str(path)!r}; expected a run folder, a .ckpt of "
            f"train.py, a portable folder or a published .pth"
        )
    if (path / CONFIG).is_file():
        held = VARPipeline.from_pretrained(path)
        return _found(path, held.tokenizer, held.transformer, held.class_names, "exported")
    path = find_checkpoint(path, stages)
    if _is_ours(path):
        networks = load_networks(path, weights)
        info = networks.info
        return _found(path, *networks[:2], info.get("class_names", ()), info["weights"])
    transformer, tokenizer = read_official(path, patch_nums)
    if transformer is None and tokenizer is None:
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a checkpoint of var-exp, and no published one"
        )
    return _found(path, tokenizer, transformer)


def _is_ours(path: Path) -> bool:
    try:
        content = read_tensors(path, mapped=True)
    except ValueError as error:
        raise ValueError(f"checkpoint: {str(path)!r}: {error}") from None
    return isinstance(content, dict) and KEY in content


def read_tokenizer(
    places: Mapping[str, str | os.PathLike | None], patch_nums: Sequence[Side]
) -> VQVAE:
    """The trained tokenizer of the first place that is given.

    Args:
        places: paths under what the configuration calls them, None for those not given.
        patch_nums: the schedule of a published tokenizer.

    Raises:
        ValueError: no place is given, or there is no tokenizer; as `read_networks`.
    """
    needs = "'stages=[var]' needs a trained tokenizer; set tokenizer_ckpt=PATH to what has one"
    key, path = next(((key, path) for key, path in places.items() if path), ("", None))
    if path is None:
        raise ValueError(f"tokenizer_ckpt: {needs}")
    held = read_networks(path, patch_nums=patch_nums, stages=("tokenizer", "var"), key=key)
    if held.tokenizer is None:
        raise ValueError(f"tokenizer_ckpt: {str(path)!r} holds a transformer only, and {needs}")
    return held.tokenizer


def read_published(name: str, folder: str | os.PathLike) -> AnyFound:
    """A published model by its name, fetched into the folder where it is not there.

    Raises:
        ValueError: as `find_official` and `load_official`.
    """
    files = find_official(name, folder)
    transformer, tokenizer = load_official(*files)
    return _found(files.transformer, tokenizer, transformer)


def _found(
    path: Path,
    tokenizer: VQVAE | None,
    transformer: VAR | None,
    class_names: Sequence[str] = (),
    weights: str = "published",
) -> AnyFound:
    num_classes = 0 if transformer is None else transformer.num_classes
    if len(class_names) != num_classes:
        class_names = [str(label) for label in range(num_classes)]
    return Found(tokenizer, transformer, tuple(class_names), path, weights)
