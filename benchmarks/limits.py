"""What a machine can do at most, measured, and what a piece of work asks of it at least.

The limits are those of a large matrix product in each precision and of a large copy. Work is
counted in floating-point operations of matrix products, convolutions and attention (a multiply and
an add are two), and in the bytes that must cross the memory whatever the program does; no machine
of these limits does it in less than the longer of the two times (the roofline of Williams et al.,
doi 10.1145/1498765.1498785). Of masked attention the visible pairs alone are counted.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from var_exp.ops.linear import linear
from var_exp.training.callbacks.throughput import LAYERS, wait_for

aten = torch.ops.aten
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
COPY_BYTES = 2**28


class Stopwatch:
    """Seconds of a call, with what it leaves a GPU to do.

    Args:
        device: that the call computes on. clock: an entry of `CLOCKS`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock = device, clock

    def __call__(self, run: Callable[[], Any]) -> float:
        wait_for(self.device)
        began = self.clock()
        run()
        wait_for(self.device)
        return self.clock() - began


class Limits:
    """Measures a machine's limits, as often as asked.

    Args:
        stopwatch: takes the times, and has the device of the products and copies.
        precisions: keys of `PRECISIONS`.
        size: side of the square matrices; small ones do not reach the limit.
    """

    def __init__(self, stopwatch: Stopwatch, precisions: Sequence[str], size: int):
        self.stopwatch, self.size, device = stopwatch, size, stopwatch.device
        self.names = [*precisions, "copy"]
        draws = torch.randn(2, size, size, device=device)
        self.matrices = {name: draws.to(PRECISIONS[name]) for name in precisions}
        count = min(COPY_BYTES, 64 * size**2) // 4
        self.source = torch.zeros(count, device=device)
        self.target = torch.zeros(count, device=device)

    def measure(self) -> dict[str, float]:
        """Operations per second in each precision, and bytes read and written per second."""
        found = {}
        for name, (a, b) in self.matrices.items():
            found[name] = 2 * self.size**3 / self._best(lambda a=a, b=b: linear(a, b))
        moved = 2 * self.source.numel() * self.source.element_size()
        found["copy"] = moved / self._best(lambda: self.target.copy_(self.source))
        return found

    def _best(self, run: Callable[[], Any], times: int = 3) -> float:
        """Seconds of the fastest of a few after a first: a limit is what is possible."""
        run()
        return min(self.stopwatch(run) for _ in range(times))


class Work(NamedTuple):
    """operations: floating-point, of matrix products, convolutions and attention.

    bytes: by precision, that cross the memory at least.
    """

    operations: float
    bytes: dict[str, float]

    def seconds_at_least(self, limits: dict[str, float], precision: str) -> float:
        """On a machine of these limits, with operations and memory perfectly overlapped."""
        computing = self.operations / limits[precision]
        return max(computing, self.bytes[precision] / limits["copy"])


def least(works: Sequence[Work]) -> Work | None:
    """What the same work needs at least, when several ways of doing it are known."""
    if not works:
        return None
    return Work(
        min(work.operations for work in works),
        {p: min(work.bytes[p] for work in works) for p in works[0].bytes},
    )


def fewest_bytes(
    networks: Sequence[nn.Module], *tensors: Tensor, passes: int = 1, per_parameter: int = 0
) -> dict[str, float]:
    """A lower bound on the bytes of some work, by precision.

    The parameters are read once for each of `passes` (a sampler's scales follow one another, and
    what is read for one is gone from the caches at the next), and what goes in and comes out
    crosses once. Everything between is taken to stay in the caches, which it does not: no program
    moves less, most move more.

    Args:
        per_parameter: further bytes for each parameter in whatever precision: 28 for a step of
            AdamW, whose weights and two moments are read and written and gradient is read, in
            float32.
    """
    count = sum(p.numel() for network in networks for p in network.parameters())
    ends = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    sizes = {name: dtype.itemsize for name, dtype in PRECISIONS.items()}
    return {p: count * (size * passes + per_parameter) + ends for p, size in sizes.items()}


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """Floating-point operations of one run, and what it returns.

    Not by the monitor's `FlopCounter`, which is for training steps: in inference mode layers reach
    it whole, and it would not see the products in them.
    """
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with counter:
        found = run()
    return counter.get_total_flops(), found


def visible(mask: Tensor | None) -> float:
    """Share of the pairs of a query and a key that a mask lets through."""
    if mask is None:
        return 1.0
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return seen.float().mean().item()


def attention(query: Tensor, key: Tensor, value: Tensor, *_, attn_mask=None, **__) -> int:
    """Two products: queries by keys, weights by values."""
    pairs = query.shape[:-1].numel() * key.shape[-2] * visible(attn_mask)
    return round(2 * pairs * (query.shape[-1] + value.shape[-1]))


def attention_backward(_, query: Tensor, key: Tensor, value: Tensor, *__, attn_mask=None, **___):
    """Five products: the weights anew, and two gradients for each of the two products."""
    pairs = query.shape[:-1].numel() * key.shape[-2] * visible(attn_mask)
    return round(2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1]))


# FlopCounterMode does not know attention and layers as CPUs compute them. It gives a formula
# the tensors themselves, not shapes, where `_get_raw` says so, as `register_flop_formula(...,
# get_raw=True)` does.
attention._get_raw = attention_backward._get_raw = True
ON_CPU = LAYERS | {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
