"""Published checkpoints to networks.

How large a network is and which variant of it stands in the names and shapes of its tensors
(`sizes.py`). The network is built without memory, compared name by name and shape by shape with
what the file holds (`names.py`), and then given the file's weights.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from var_exp.checkpoint.official.names import Carried, Entry, entries
from var_exp.checkpoint.official.sizes import (
    State,
    phi_row,
    tokenizer_arguments,
    transformer_arguments,
)
from var_exp.io.files import read_tensors
from var_exp.sampling.generate import check_fit
from var_exp.scales import Side
from var_exp.tokenizer import VQVAE, Codebook, Decoder, Encoder, MultiScaleQuantizer
from var_exp.transformer import VAR

Source = str | os.PathLike | Mapping[str, Any]
Network = TypeVar("Network", VAR, VQVAE)


class OfficialNetworks(NamedTuple):
    """Networks of published files; None where no file was given."""

    transformer: VAR | None
    tokenizer: VQVAE | None


def load_official(
    transformer: Source | None = None,
    tokenizer: Source | None = None,
    *,
    cosine_codes: bool = False,
    patch_nums: Sequence[Side] | None = None,
    num_heads: int | None = None,
) -> OfficialNetworks:
    """Build networks from published checkpoints, in evaluation mode and frozen.

    Args:
        transformer, tokenizer: a file or its content: a state dict, also that of a compiled or
            wrapped network, or a checkpoint of the authors' trainer. The networks get copies
            of the tensors, in float32.
        cosine_codes: the tokenizer was trained with `using_znorm`; its file does not say so.
        patch_nums: the schedule, where no file says it. A transformer's file does, in `lvl_1L`.
            A tokenizer's does not; it takes the transformer's, or else that of the published
            models for 256 pixels.
        num_heads: heads of a transformer without QK-norm, unless they have 64 channels each.

    Returns:
        (transformer, tokenizer), None where nothing was given.

    Raises:
        ValueError: a file is missing, damaged, holds code, is something else, or has a tensor
            that does not fit the others; or the two networks do not fit each other.
    """
    var = vqvae = None
    if transformer is not None:
        with _named(transformer):
            state = _read(transformer, "var_wo_ddp")
            var = _transformer(state, patch_nums, num_heads)
            patch_nums = var.schedule.patch_nums
    if tokenizer is not None:
        with _named(tokenizer):
            state = _read(tokenizer, "vae_local")
            vqvae = _tokenizer(state, patch_nums, cosine_codes)
    if var is not None and vqvae is not None:
        check_fit(var, vqvae)
    return OfficialNetworks(var, vqvae)


def read_official(
    path: str | os.PathLike, patch_nums: Sequence[Side] | None = None
) -> OfficialNetworks:
    """Whatever one file holds: a transformer, a tokenizer, or both (the authors' trainer).

    Args:
        patch_nums: the schedule of a tokenizer, as in `load_official`; a transformer's is that
            of its file.

    Returns:
        `OfficialNetworks`, None where the file has no such network.

    Raises:
        ValueError: as `load_official`.
    """
    with _named(path):
        held = _held(path)
    transformer = load_official(path).transformer if "transformer" in held else None
    tokenizer = None
    if transformer is not None:
        patch_nums = patch_nums or transformer.schedule.patch_nums
    if "tokenizer" in held:
        tokenizer = load_official(tokenizer=path, patch_nums=patch_nums).tokenizer
    return OfficialNetworks(transformer, tokenizer)


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Whatever is wrong with a source is told with its name."""
    try:
        yield
    except ValueError as error:
        name = "the state dict" if isinstance(source, Mapping) else repr(str(source))
        raise ValueError(f"official: {name}: {error}") from None


# -- what a source holds ------------------------------------------------------------------


def _held(path: str | os.PathLike) -> set[str]:
    """Which networks a file holds, by the tensors that each must have."""
    content, held = read_tensors(path, mapped=True), set()
    for kind, part, tensor in (
        ("transformer", "var_wo_ddp", "pos_1LC"),
        ("tokenizer", "vae_local", "quantize.embedding.weight"),
    ):
        with contextlib.suppress(ValueError):
            held |= {kind} if tensor in _read(content, part) else set()
    return held


def _read(source: Source, part: str) -> State:
    """The state dict of one network under its published names."""
    # Mapped, so that a trainer's optimizer state is never read.
    content = read_tensors(source, mapped=True) if isinstance(source, str | os.PathLike) else source
    for key in ("trainer", part):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(
            f"it is not a published checkpoint; expected a state dict, or one of the authors' "
            f"trainer with {part!r}"
        )
    return {_published_name(name): tensor for name, tensor in content.items()}


def _published_name(name: str) -> str:
    """Without what torch.compile and data-parallel wrappers add."""
    return re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))


# -- networks -----------------------------------------------------------------------------


def _transformer(state: State, patch_nums: Sequence[Side] | None, num_heads: int | None) -> VAR:
    if "encoder.conv_in.weight" in state:
        raise ValueError("it holds a tokenizer; expected a transformer (tokenizer=...)")
    arguments = transformer_arguments(state, patch_nums, num_heads)
    with torch.device("meta"):
        network = VAR(**arguments)
    tiny = {"vocab_size": 2, "code_dim": 1, "num_classes": 0, "width": 1, "num_heads": 1}
    with torch.device(_device(state)):
        same_buffers = VAR(**arguments | tiny)
    for name, buffer in same_buffers.named_buffers():
        parent, _, own = name.rpartition(".")
        network.get_submodule(parent).register_buffer(own, buffer, persistent=False)
    return _fill(network, state)


def _tokenizer(state: State, patch_nums: Sequence[Side] | None, cosine_codes: bool) -> VQVAE:
    if "pos_1LC" in state:
        raise ValueError("it holds a transformer; expected a tokenizer (transformer=...)")
    channels, sizes, arguments = tokenizer_arguments(state, patch_nums)
    codebook = Codebook(arguments.pop("vocab_size"), sizes["code_dim"], cosine_codes)
    quantizer = MultiScaleQuantizer(codebook=codebook, **arguments).to(_device(state))
    quantizer.started.fill_(True)
    with torch.device("meta"):
        network = VQVAE(Encoder(channels, **sizes), quantizer, Decoder(channels, **sizes))
    hits = state.get("quantize.ema_vocab_hit_SV")
    vars(network)["official"] = Carried(phi_row(state), None if hits is None else hits.clone())
    return _fill(network, state)


def _device(state: State) -> torch.device:
    return next(iter(state.values())).device


def _fill(network: Network, state: State) -> Network:
    """Give a network, whose weights may be without memory, those of a file."""
    expected = entries(network)
    _check(expected, state)
    paths = {id(parameter): path for path, parameter in network.named_parameters()}
    weights = {
        paths[id(entry.tensor)]: state[entry.name].detach().to(torch.float32, copy=True)
        for entry in expected
        if not entry.computed
    }
    network.load_state_dict(weights, strict=False, assign=True)
    _check_computed(entries(network), state)
    return network.eval().requires_grad_(False)


def _check(expected: list[Entry], state: State) -> None:
    """Every tensor has its place, and every place but the computed ones its tensor."""
    wrong = []
    for name, tensor, computed in expected:
        shape = tuple(tensor.shape)
        if name not in state:
            wrong += [] if computed else [f"{name} is missing, it should have the shape {shape}"]
            continue
        has = tuple(state[name].shape)
        if has != shape:
            wrong.append(f"{name} has the shape {has}, it should have {shape}")
        elif state[name].is_floating_point() != tensor.is_floating_point():
            wrong.append(f"{name} holds {state[name].dtype}, it should hold {tensor.dtype}")
    known = {entry.name for entry in expected}
    for name in state:
        if name not in known:
            wrong.append(f"{name} has the shape {tuple(state[name].shape)} and no place")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"it does not fit: {wrong[0]}{more}")


def _check_computed(expected: list[Entry], state: State) -> None:
    """What a file holds of the computed tensors is what the published code computes."""
    for name, tensor, computed in expected:
        given = state.get(name) if computed else None
        if given is not None and not given.is_meta and not torch.equal(given.to(tensor), tensor):
            raise ValueError(f"{name} holds other values than the published code computes")
