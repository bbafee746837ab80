"""Networks compiled for sampling: the transformer's blocks for each scale, and the decoder.

Every scale has a number of tokens of its own, which never changes, so each gets its own code, for
all blocks together. The decoder is compiled for GPUs alone: a CPU spends its time in convolutions,
which are the same in compiled code. What compiling gains and costs is in docs/speed.md.
"""

import itertools
from types import FunctionType
from typing import Any

import torch

from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR, KVCache
from var_exp.transformer.var import call_block


def compile_for_sampling(
    transformer: VAR, tokenizer: VQVAE, backend: str = "inductor", graphs: bool = False
) -> None:
    """Let a pair of networks sample by compiled code, made at the first batch of each size.

    In place, on the device where they are to stay; no key of a state dict changes, nor anything
    that is computed but by rounding. Each batch size is compiled by itself; after eight torch
    stops, and goes on uncompiled.

    Args:
        backend: of `torch.compile`.
        graphs: record the blocks as CUDA graphs, too, with which a GPU does not wait for Python at
            every kernel. Keys and values then stay where they are for the next batch of the size,
            so that one batch must be drawn after the other. It was never run: no GPU was at hand.
    """
    names = [f"block_of_scale_{name}" for name in transformer.schedule.names]
    options = {"backend": backend, "dynamic": False}
    graphed = options | ({"mode": "reduce-overhead"} if graphs else {})
    calls = tuple(torch.compile(renamed(name), **graphed) for name in names)
    caches = StaticCaches() if graphs else None
    transformer.computing = transformer.computing._replace(scale_calls=calls, caches=caches)
    if next(tokenizer.parameters()).device.type != "cpu":
        tokenizer.decoder.compile(**options)


class StaticCaches(dict):
    """Caches whose memory is told to the compiler as one that stays: a graph may write into it."""

    def __setitem__(self, key: tuple[Any, ...], cache: KVCache) -> None:
        for tensor in itertools.chain.from_iterable(cache.hold_layers()):
            torch._dynamo.mark_static_address(tensor, guard=False)
        super().__setitem__(key, cache)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch has nothing to compile with."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of whichever compiler
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"compile: torch cannot compile here ({reason}); install a C++ compiler, on a GPU "
            f"Triton, or leave it out (compile=false)"
        ) from None


def renamed(name: str) -> FunctionType:
    """A `call_block` of its own: torch counts, and limits, the versions of one function."""
    code = call_block.__code__.replace(co_name=name)
    return FunctionType(code, call_block.__globals__, name)
