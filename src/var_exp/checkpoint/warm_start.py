"""A warm start: a new network takes over the weights of another that it can go on from.

Whatever the two have in common is copied exactly. A transformer may be for another number of
classes or another schedule than its source, a tokenizer for another schedule: what belongs to a
class is made again, and what belongs to a place in the token maps is resized, as vision
transformers are for other image sizes (Dosovitskiy et al., arXiv 2010.11929, section 3.2).

    K scales, (h_k, w_k) sides of scale k, n tokens, C width
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from var_exp.checkpoint.load import AnyFound, read_networks
from var_exp.distributed.rank import is_main_process
from var_exp.tokenizer import VQVAE, Codebook
from var_exp.transformer import VAR

STAGES = {"tokenizer": "tokenizer", "transformer": "var"}  # network: the stage that trains it

# Arguments that two networks need not share: what is converted, and what only training sees.
FREE = {"patch_nums", "num_classes", "dropout", "drop_path", "gate_init"}
FREE |= {"beta", "quantizer_dropout", "quantizer_dropout_from", "entropy", "entropy_temperature"}
FREE |= {"decay", "restart_below", "start_from"}
SHOWN = 4  # differences that a refusal names

# Where an argument comes from, if not from its own place in the configuration.
KEYS = {
    "transformer.vocab_size": "tokenizer_ckpt, or tokenizer.quantizer.codebook.vocab_size",
    "transformer.code_dim": "tokenizer_ckpt, or tokenizer.encoder.code_dim",
    "tokenizer.encoder.in_channels": "data",
    "tokenizer.decoder.out_channels": "data",
}


def warm_start_from(
    path: str | os.PathLike | None, network: VAR | VQVAE, stages: Sequence[str]
) -> None:
    """Give a new network the weights that a path holds for it, and say so; None holds none.

    Args:
        path: whatever `read_networks` reads.
        stages: those of the run. The path must hold the network of one of them at least; a
            network that it does not hold stays as it is.

    Raises:
        ValueError: as `read_networks`; or the path holds no network of these stages, or one
            that the network cannot go on from.
    """
    if path is None:
        return
    name = "transformer" if isinstance(network, VAR) else "tokenizer"
    order = sorted(STAGES.values(), key=lambda stage: stage != STAGES[name])
    patch_nums = network.schedule.patch_nums
    found = read_networks(path, patch_nums=patch_nums, stages=order, key="init_from")
    _check_held(path, found, stages)
    source = getattr(found, name)
    if source is None:
        return
    try:
        if isinstance(network, VAR):
            warm_start(network, source)
        else:
            warm_start_tokenizer(network, source)
    except ValueError as error:
        raise ValueError(f"init_from: {str(path)!r}: {error}") from None
    if is_main_process():
        print(f"init_from: the {name} starts from {found.path}")


def _check_held(path: str | os.PathLike, found: AnyFound, stages: Sequence[str]) -> None:
    """Raise ValueError unless some network was found that the stages train."""
    held = [name for name in STAGES if getattr(found, name) is not None]
    trained = [name for name, stage in STAGES.items() if stage in stages]
    if not set(held) & set(trained):
        raise ValueError(
            f"init_from: expected a {trained[0]}, which the stages {list(stages)} train, got "
            f"{str(path)!r} with a {held[0]} only"
        )


# -- the transformer ----------------------------------------------------------------------


@torch.no_grad()
def warm_start(network: VAR, source: VAR) -> None:
    """Start a transformer from another's weights, in place.

    With another number of classes the network keeps its fresh table, but for the row of "no
    class". With another schedule each scale takes the position and level embedding of the
    source's scale of the nearest size (the coarser of two), resized to its own.

    Raises:
        ValueError: the two differ in anything else that the weights depend on.
    """
    _check_equal("transformer", _transformer_facts(network), _transformer_facts(source))
    old, new = source.schedule, network.schedule
    state = source.state_dict()
    if network.num_classes != source.num_classes:
        table = network.class_embedding.weight.clone()  # (classes + 1, C)
        table[-1] = source.class_embedding.weight[-1]
        state["class_embedding.weight"] = table
    nearest = [_nearest(size, old.sizes) for size in new.sizes]
    state["level_embedding.weight"] = source.level_embedding.weight[nearest]  # (K, C)
    places = old.split(source.position)
    state["position"] = torch.cat(
        [
            resize_grid(places[j], old.sizes[j], size)
            for j, size in zip(nearest, new.sizes, strict=True)
        ],
        dim=1,
    )
    state["start_position"] = resize_grid(source.start_position, old.sizes[0], new.sizes[0])
    network.load_state_dict(state)


def resize_grid(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A grid of vectors in reading order, resized bicubically: (1, h w, C) -> (1, h' w', C)."""
    if old == new:
        return x
    grid = x.transpose(1, 2).unflatten(2, old)  # (1, C, h, w)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2)  # (1, h' w', C)


def _nearest(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """Which of the sizes, from coarse to fine, is the nearest; the first of equals."""
    distances = [abs(h - size[0]) + abs(w - size[1]) for h, w in sizes]
    return distances.index(min(distances))


def _transformer_facts(network: VAR) -> dict[str, Any]:
    """What its weights depend on, sizes that follow from others included."""
    facts = _flat(network.config, "transformer")
    facts["transformer.width"], facts["transformer.num_heads"] = network.width, network.num_heads
    facts["transformer.mlp_ratio"] = network.blocks[0].mlp.fc2.in_features / network.width
    if facts["transformer.qk_norm"]:
        facts["transformer.softmax_scale"] = 1.0  # whatever it says, it is not used
    return facts


# -- the tokenizer ------------------------------------------------------------------------


@torch.no_grad()
def warm_start_tokenizer(network: VQVAE, source: VQVAE) -> None:
    """Start a tokenizer from another's weights, in place; its codes do not start from data.

    The schedule may be another one where the scales share their codebook. A table of codes may
    be learned in another way: moving averages that the source has not start from its codes, at
    the first batch.

    Raises:
        ValueError: the two differ in anything else that the weights depend on.
    """
    _check_equal("tokenizer", _tokenizer_facts(network), _tokenizer_facts(source))
    if len(network.quantizer.codebooks) > 1 and network.schedule != source.schedule:
        raise ValueError(
            f"it holds a tokenizer with a codebook for each of the scales "
            f"{source.schedule.patch_nums}, not {network.schedule.patch_nums} (scales.patch_nums)"
        )
    own, state = network.state_dict(), source.state_dict()
    network.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    network.quantizer.started.fill_(own.keys() <= state.keys())
    for codebook in network.quantizer.codebooks:
        codebook.start_from = "none"  # where averages still have to start: from these codes


def _tokenizer_facts(network: VQVAE) -> dict[str, Any]:
    facts = _flat(network.config, "tokenizer")
    if isinstance(network.quantizer.codebook(0), Codebook):  # however it is learned
        facts["tokenizer.quantizer.codebook._target_"] = "a table of codes"
    for part in ("encoder", "decoder"):
        blocks = f"tokenizer.{part}.num_res_blocks"
        if isinstance(facts[blocks], int):  # one number for all levels
            facts[blocks] = [facts[blocks]] * len(facts[f"tokenizer.{part}.multipliers"])
    return facts


# -- what must agree ----------------------------------------------------------------------


def _flat(spec: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arguments of a spec and of the specs in it under dotted names, without the free ones."""
    facts: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            facts |= _flat(value, f"{prefix}.{name}")
        elif name not in FREE:
            facts[f"{prefix}.{name}"] = value
    return facts


def _check_equal(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    names = list(ours) + [name for name in theirs if name not in ours]
    wrong = [
        f"{name.rpartition('.')[2]} {theirs.get(name)} instead of {ours.get(name)} "
        f"({KEYS.get(name, name)})"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise ValueError(f"it holds a {what} with {', '.join(wrong[:SHOWN])}{more}")
