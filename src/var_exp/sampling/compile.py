"""Compile networks for sampling: the transformer's blocks once for each scale, and the decoder.

A scale has a fixed number of tokens, so each gets its own code, shared by all blocks. The decoder
is compiled on GPUs alone: a CPU spends its time in convolutions, which compiling leaves unchanged.
docs/speed.md has what compiling gains and costs.
"""

import functools

import torch

from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR, KVCache
from var_exp.transformer.var import call_block

BATCH_SIZES = 8  # that may be compiled; torch runs others uncompiled, with a warning


def compile_for_sampling(
    transformer: VAR, tokenizer: VQVAE, backend: str = "inductor", graphs: bool = False
) -> None:
    """Compile both networks in place, at the first batch of each size; outputs change by rounding.

    State-dict keys do not change. Call it on the device where the networks are to stay.

    Args:
        backend: of `torch.compile`.
        graphs: also record the blocks as CUDA graphs, so that a GPU does not wait for Python at
            every kernel. Batches of one size then share a cache and must not overlap. Not run yet:
            no GPU was available.
    """
    mode = "reduce-overhead" if graphs else None
    limit = BATCH_SIZES * transformer.schedule.num_scales
    limited = torch._dynamo.config.patch(recompile_limit=limit)
    transformer.execution = transformer.execution._replace(
        scale_call=limited(torch.compile(call_block, backend=backend, dynamic=False, mode=mode)),
        make_cache=static_caches() if graphs else KVCache,
    )
    if next(tokenizer.parameters()).device.type != "cpu":
        tokenizer.decoder.compile(backend=backend, dynamic=False)


def static_caches():
    """A `make_cache` that keeps one cache for each size, at an address that graphs may write to."""

    @functools.cache
    def keep(*sizes) -> KVCache:
        cache = KVCache(*sizes)
        for tensor in (tensor for layer in cache.layers for tensor in layer):
            torch._dynamo.mark_static_address(tensor, guard=False)
        return cache

    def make_cache(*sizes) -> KVCache:
        # Every call of a block would otherwise begin a generation of graphs, and free the output of
        # the block before (https://github.com/pytorch/pytorch/issues/152887).
        torch.compiler.cudagraph_mark_step_begin()
        return keep(*sizes)

    return make_cache


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if torch cannot compile for this device."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of whichever compiler
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"compile: torch cannot compile here ({reason}); install a C++ compiler, on a GPU "
            f"Triton, or leave it out (compile=false)"
        ) from None
