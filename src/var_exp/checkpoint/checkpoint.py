"""Our checkpoint files: what they say about themselves, and the networks inside.

Next to the weights a checkpoint holds, under the key `var_exp`, plain data: the specs from
which its networks are built, the scale schedule, the fingerprint of the tokenizer and the
names of the classes. So a file alone is a complete generator, and loads with
`weights_only=True`: nothing in it can run code.
"""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from var_exp.configurable import build, with_current_names
from var_exp.io.files import atomic_write, read_tensors, sync, verify_checksum, write_checksum
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

FORMAT = 4
KEY = "var_exp"


class Networks(NamedTuple):
    """What a checkpoint holds; `transformer` is None in one of the tokenizer stage.

    info: stage, patch_nums, tokenizer_fingerprint, class_names, what the training added, and
        which weights these are, "averaged" or "raw".
    """

    tokenizer: VQVAE
    transformer: VAR | None
    info: dict[str, Any]


def describe(
    stage: str, networks: dict[str, Any], class_names: list[str], weights: str = "averaged"
) -> dict:
    """The plain data that a checkpoint carries about its networks.

    Args:
        weights: which of them the run validates and hands on, "averaged" or "raw".
    """
    tokenizer = networks["tokenizer"]
    return {
        "format": FORMAT,
        "stage": stage,
        "networks": {name: network.config for name, network in networks.items()},
        "patch_nums": tokenizer.schedule.patch_nums,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "class_names": class_names,
        "weights": weights,
    }


def find_checkpoint(path: str | os.PathLike, stages: Sequence[str] = ("var", "tokenizer")) -> Path:
    """The best checkpoint of a run folder (or of a stage's folder), or the file itself.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    folders = [path / stage for stage in stages] + [path]
    for folder in folders:
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / name).is_file():
                return folder / name
    raise ValueError(
        f"checkpoint: no checkpoint at {str(path)!r}; expected a .ckpt file or a run folder with "
        f"{' or '.join(f'{stage}/best.ckpt' for stage in stages)}"
    )


def write_checkpoint(
    content: dict[str, Any], path: str | os.PathLike, keep: Path | None = None
) -> None:
    """Write a checkpoint that verifies itself, whole or not at all, and on the disk at the end.

    Args:
        keep: where the file that stood at `path` goes.

    Raises:
        OSError: it could not be written; what stood at `path` stays.
    """
    path = Path(path)
    with atomic_write(path, keep) as unfinished:
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:  # how torch says that the disk is full
            raise OSError(str(error).splitlines()[0]) from None
        write_checksum(unfinished)
        sync(unfinished)
    sync(path.parent)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load one of our checkpoints on the CPU, as plain data and tensors only.

    Raises:
        ValueError: the file is missing, damaged, holds code, or is not one of ours.
    """
    try:
        content = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {str(path)!r}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        raise ValueError(
            f"checkpoint: {str(path)!r} is not a checkpoint of var-exp; expected a file that "
            f"`train.py` wrote"
        )
    form = content[KEY].get("format")
    if type(form) is not int or form != FORMAT:  # a tensor has no truth
        shown = form if isinstance(form, int | None) else f"of a {type(form).__name__}"
        raise ValueError(
            f"checkpoint: {str(path)!r} has format {shown}, this version reads {FORMAT}; use the "
            f"version of var-exp that wrote it"
        )
    try:
        verify_checksum(path)  # last: files that are none of ours are told by what they hold
    except ValueError as error:
        raise ValueError(f"checkpoint: {str(path)!r}: {error}") from None
    networks = content[KEY].get("networks")
    content[KEY]["networks"] = with_current_names(networks)
    return content


def check_weights(weights: str | None) -> None:
    """Raise ValueError unless these are weights that `load_networks` can be asked for."""
    if weights not in (None, "averaged", "raw"):
        raise ValueError(f"weights: expected averaged, raw or null, got {weights!r} (weights)")


def load_networks(path: str | os.PathLike, weights: str | None = None) -> Networks:
    """Build and fill the networks of a checkpoint, in evaluation mode, on the CPU.

    Args:
        path: a checkpoint file, or a run folder.
        weights: "averaged" takes the moving average where the run kept one, "raw" the weights
            themselves, None what the run was told to hand on.

    Raises:
        ValueError: see `find_checkpoint` and `read_checkpoint`; an unknown `weights`; or
            tensors that do not fit what the checkpoint says about its networks.
    """
    check_weights(weights)
    path = find_checkpoint(path)
    content = read_checkpoint(path)
    try:
        chosen = weights or content[KEY]["weights"]
        return _build_networks(content[KEY], content["state_dict"], chosen)
    except (AttributeError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(
            f"checkpoint: {str(path)!r} does not hold the networks it describes ({reason})"
        ) from None


def _build_networks(info: dict[str, Any], state: dict[str, Tensor], weights: str) -> Networks:
    networks, used = {}, "raw"
    for name, spec in info["networks"].items():
        averaged = {k: v for k, v in state.items() if k.startswith(f"averaged_{name}.")}
        prefix = f"{name}."
        if averaged and weights == "averaged":
            prefix, used = f"averaged_{name}.", "averaged"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        network = build(spec)
        network.load_state_dict(own)
        networks[name] = network.eval().requires_grad_(False)
    info = info | {"weights": used}
    return Networks(networks["tokenizer"], networks.get("transformer"), info)
