"""Floating-point operations: how many a piece of work takes, and how many the machine can do."""

import functools
import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from var_exp import onednn
from var_exp.transformer.linear import linear

SMALLEST, LARGEST = 256, 8192  # sides of the matrices; the largest three take 0.8 GB in float32
LONG_ENOUGH = 0.01  # seconds of a product, beside which starting and timing it weigh little
SECONDS = 0.2  # for the repetitions, of which the best counts: others may share the machine


def attention(query, key, value, *_, out_shape=None, **__) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def attention_backward(gradient, query, key, value, *_, out_shape=None, **__) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


def linear_layer(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * prod(x) * weight[0]


def convolution(x, kernel, *_, out_shape=None, **__) -> int:
    return 2 * prod(out_shape) * prod(kernel[1:])


def pairs(query, key, *_, out_shape=None, **__) -> int:
    return 2 * prod(query) * key[-2]


# What CPUs compute by operators that torch's own table leaves out.
LAYERS = {
    onednn.LINEAR: linear_layer,
    onednn.CONVOLUTION: convolution,
    torch.ops.var_exp.products: pairs,
}
LAYERS.pop(None, None)  # of operators that this torch does not have
ON_CPU = LAYERS | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
FORMULAS: dict[Any, Callable[..., int]] = flop_counter.flop_registry | {
    operator: flop_counter.shape_wrapper(formula) for operator, formula in ON_CPU.items()
}


class FlopCounter(TorchDispatchMode):
    """Count the operations of what runs within it, without changing a bit of it.

    Torch's own `FlopCounterMode` takes composed operators apart, which rounds gradients
    differently. The formulas are torch's: matrix products, convolutions and attention, a
    multiplication and an addition being two.
    """

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure once per process: the best of a few products of square matrices.

    Not the maker's figure but what can be reached here, with the threads and the settings of
    this process, so that a share of it means something on any machine. Takes less than half a
    second, and draws from no random generator but its own.

    Args:
        device: to measure.
        dtype: of the factors.

    Returns:
        Operations a second, counted as by `FlopCounter`.
    """
    side = SMALLEST
    seconds = time_product(*factors(side, device, dtype))
    while seconds < LONG_ENOUGH and side < LARGEST:
        side *= 2
        pair = factors(side, device, dtype)
        time_product(*pair)  # the first of a size may also choose how to compute it
        seconds = time_product(*pair)
    pair = factors(side, device, dtype)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, time_product(*pair))
    return 2 * side**3 / seconds


def factors(side: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2)
    )


def time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of a matrix product, until it is done."""
    wait_for(a.device)
    start = time.perf_counter()
    linear(a, b)
    wait_for(a.device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
