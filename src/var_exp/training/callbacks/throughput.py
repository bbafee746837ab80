"""How fast a stage trains and what holds it up, logged as `speed/...`.

    images_per_second   of all processes together
    data_wait           share of the time spent waiting for the next batch, in [0, 1]
    tflops              10^12 floating-point operations a second, of one device
    share_of_peak       the same as a share of what a large matrix product reaches there
    memory_gb           largest resident size of this process so far, in 10^9 bytes
    device_memory_gb    most memory that torch held on the accelerator so far, where there is one
    hours_left          until the end of the stage, validations and evaluations included

All but the first are those of the first process. The time of a batch is from asking for it to
having trained on it, so that validations, evaluations and checkpoints count only in `hours_left`,
which is reckoned from this session's batches alone: an interruption does not bend it. Operations
are counted in one batch for each amount of work that a batch may be; that batch is slow, and is
left out of the times. Where none of its operators are known, the figures are left out.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable
from math import prod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from var_exp.distributed.collectives import world_size
from var_exp.ops.linear import ONEDNN_LINEAR, linear
from var_exp.training.loggers.guarded import log_scalars
from var_exp.training.module import StageModule, data_of, stage_of

SMALLEST, LARGEST = 256, 8192  # sides of the matrices; the largest three take 0.8 GB in float32
LONG_ENOUGH = 0.01  # seconds of a product, beside which starting and timing it weigh little
SECONDS = 0.2  # for the repetitions, of which the best counts: others may share the machine


# -- floating-point operations --------------------------------------------------------------


def linear_layer(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * prod(x) * weight[0]


# What CPUs compute by operators that torch's own table leaves out.
LAYERS = {} if ONEDNN_LINEAR is None else {ONEDNN_LINEAR: linear_layer}
FORMULAS: dict[Any, Callable[..., int]] = flop_counter.flop_registry | {
    operator: flop_counter.shape_wrapper(formula) for operator, formula in LAYERS.items()
}
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS[attention] = flop_counter.sdpa_flop
FORMULAS[attention_backward] = flop_counter.sdpa_backward_flop


class FlopCounter(TorchDispatchMode):
    """Count the operations of what runs within it, without changing a bit of it.

    Torch's own `FlopCounterMode` takes composed operators apart, which rounds gradients
    differently. The formulas are torch's: matrix products, convolutions and attention, a
    multiplication and an addition being two. What else would be compiled runs eagerly meanwhile,
    FlexAttention too, since the operators within a compiled kernel are not seen.
    """

    supports_higher_order_operators = True  # FlexAttention is one
    flops = 0

    def __enter__(self):
        self.stance = torch.compiler.set_stance("force_eager")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stance.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(getattr(func, "_overloadpacket", func))
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
    product = timed_product(side, device, dtype)
    seconds = product()
    while seconds < LONG_ENOUGH and side < LARGEST:
        side *= 2
        product = timed_product(side, device, dtype)
        product()  # the first of a size may also choose how to compute it
        seconds = product()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, product())
    return 2 * side**3 / seconds


def timed_product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A function that computes a product of random matrices and returns its seconds."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, side, side, generator=generator, device=device).to(dtype)

    def product() -> float:
        wait_for(device)
        start = time.perf_counter()
        linear(a, b)
        wait_for(device)
        return time.perf_counter() - start

    return product


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# -- the monitor ----------------------------------------------------------------------------


class ThroughputMonitor(Callback):
    """Log `speed/...` at the trainer's logging interval.

    Stands before callbacks that evaluate, or their time would be that of a batch. Lightning's
    callback of this name does not serve: it waits for a GPU after every batch, counts evaluations
    and checkpoints as training, divides by peaks from a table that has no CPU, and cannot leave
    out the slow batch whose operations are counted.
    """

    state_key = "Monitor"  # in checkpoints

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}  # operations of a batch in one process, by `workload`
        self.counter: FlopCounter | None = None
        self.fetches: DataWaitProfiler | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"flops": self.flops, "processes": world_size()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["processes"] == world_size():
            self.flops = state["flops"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first, self.since = 0, 0.0  # the first batch in `hours_left`, and when it began
        self.reset()
        if trainer.is_global_zero:
            dtype = torch.bfloat16 if "bf16" in trainer.precision else torch.float32
            self.peak = peak_flops(module.device, dtype)
            # Lightning's connectors set the profiler.
            self.fetches = DataWaitProfiler(trainer.profiler)  # type: ignore[attr-defined]
            trainer.profiler = self.fetches  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Begin the sums of an interval."""
        self.batches, self.busy, self.waited, self.work = 0, 0.0, 0.0, 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if trainer.is_global_zero and stage_of(module).workload not in self.flops:
            self.counter = FlopCounter()
            self.counter.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        if not trainer.is_global_zero:
            return
        now, stage = time.perf_counter(), stage_of(module)
        if self.counter is not None:
            self.flops[stage.workload] = self.counter.flops
            self.stop_counting()
        elif self.fetches is not None:
            self.batches += 1
            self.busy += now - self.fetches.started
            self.waited += self.fetches.stopped - self.fetches.started
            self.work += self.flops[stage.workload]
        if not self.since:
            self.first, self.since = stage.batch + 1, now
        if self.batches and stage.is_logged:
            metrics = self.metrics(trainer, stage, now)
            named = {f"speed/{name}": value for name, value in metrics.items()}
            log_scalars(trainer, named, stage.batch)
            self.reset()

    def stop_counting(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counter = None

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.fetches is not None:
            trainer.profiler = self.fetches.profiler  # type: ignore[attr-defined]
            self.fetches = None

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, *_) -> None:
        self.stop_counting()
        self.on_train_end(trainer, module)

    def metrics(self, trainer: L.Trainer, module: StageModule, now: float) -> dict[str, float]:
        """Of the interval that ends now."""
        data = data_of(trainer)
        metrics = {
            "images_per_second": data.batch_size * self.batches / self.busy,
            "data_wait": self.waited / self.busy,
            "memory_gb": resident_bytes() / 1e9,
        }
        if module.device.type != "cpu":
            device = torch.get_device_module(module.device)
            metrics["device_memory_gb"] = device.max_memory_allocated(module.device) / 1e9
        if self.work:
            metrics["tflops"] = self.work / self.busy / 1e12
            metrics["share_of_peak"] = self.work / self.busy / self.peak
        done = module.batch + 1 - self.first
        if done:
            left = data.num_batches - module.batch - 1
            metrics["hours_left"] = (now - self.since) / done * left / 3600
        return metrics


class DataWaitProfiler(Profiler):
    """Wrap another profiler, and note when the loop asks for its next batch and when it has it."""

    FETCH = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(self, profiler: Profiler):
        super().__init__()
        self.profiler = profiler

    def start(self, action_name: str) -> None:
        self.profiler.start(action_name)
        if action_name == self.FETCH:
            self.started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name == self.FETCH:
            self.stopped = time.perf_counter()
        self.profiler.stop(action_name)

    def summary(self) -> str:
        return self.profiler.summary()


def resident_bytes() -> int:
    """Largest resident size of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
