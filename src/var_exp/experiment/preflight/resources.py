"""What a stage takes: parameters, the memory of each device, the size of a checkpoint.

Weights, gradients, averages and moments are counted; what a training step holds besides is
rehearsed (`rehearsal.py`). Nothing here has content: networks may be on the meta device.
"""

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from var_exp.experiment.preflight.rehearsal import rehearse
from var_exp.io.files import nearest
from var_exp.io.pretrained import Frozen
from var_exp.training.module import StageModule, as_list

KEPT = 3  # checkpoints of a stage: last, previous, best; one more while it is written


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(nearest(folder)).free


def checkpoints_bytes(sizes: Sequence[int]) -> int:
    """Of all checkpoints that are on the disk at once, at most; sizes of one of each stage."""
    return KEPT * sum(sizes) + max(sizes, default=0)


SHARDED = ("fsdp", "shard", "modelparallel")  # in the name of a strategy


class Devices(NamedTuple):
    """What shares the work.

    each: devices of a machine; num_nodes: machines.
    shards: among how many devices weights, gradients, averages and moments are split.
    buckets: whether gradients are held twice, as DDP does to sum them.
    """

    each: int
    num_nodes: int
    shards: int = 1
    buckets: bool = False

    @property
    def total(self) -> int:
        return self.each * self.num_nodes


def devices_of(trainer: Mapping[str, Any], available: int) -> Devices:
    """The devices that a Trainer is asked for.

    Args:
        trainer: its arguments; `strategy` is a name, or a mapping with a `_target_`.
        available: of the kind that it asks for, on this machine; counts where it takes all.

    Raises:
        ValueError: numbers that are no numbers of devices.
    """
    asked, num_nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    if asked in ("auto", -1, "-1"):
        each = max(available, 1)
    elif isinstance(asked, list):
        each = len(asked)
    else:
        each = int(asked) if str(asked).isdigit() else 0
    if each < 1 or not isinstance(num_nodes, int) or num_nodes < 1:
        raise ValueError(
            f"trainer: expected at least one device and one machine, got devices {asked!r} and "
            f"num_nodes {num_nodes!r} (trainer.devices, trainer.num_nodes)"
        )
    strategy = trainer.get("strategy", "auto")
    name = (strategy if isinstance(strategy, str) else strategy["_target_"]).lower()
    total, is_sharded = each * num_nodes, any(word in name for word in SHARDED)
    return Devices(each, num_nodes, total if is_sharded else 1, total > 1 and not is_sharded)


class Parameters(NamedTuple):
    """Numbers of parameters of a network, those that are trained and those that are not."""

    trained: int
    frozen: int


class MemoryEstimate(NamedTuple):
    """Bytes.

    Of one device: weights of the network in training, its average, moments of the optimizers,
    other networks; gradients; `kept` for the backward pass of a micro-batch; `step`, the most that
    a training step takes besides the first four; `sampling`, the keys and values of a batch of
    samples; `whole`, what sharded networks take besides while they are validated.
    Of the disk: checkpoint.
    """

    weights: int
    average: int
    moments: int
    others: int
    gradients: int
    kept: int
    step: int
    sampling: int
    whole: int
    checkpoint: int

    @property
    def steady(self) -> int:
        return self.weights + self.average + self.moments + self.others

    @property
    def training(self) -> int:
        return self.steady + self.step

    @property
    def validation(self) -> int:
        return self.steady + self.sampling + self.whole

    def shared(self, devices: Devices) -> "MemoryEstimate":
        """Of each of these devices, where this is of one that is alone."""
        n = devices.shards
        gradients = self.gradients // n + (self.gradients if devices.buckets else 0)
        return self._replace(
            weights=self.weights // n,
            average=self.average // n,
            moments=self.moments // n,
            gradients=gradients,
            step=self.step - self.gradients + gradients,
            whole=self.weights + self.average if n > 1 else 0,
        )


def parameters_of(module: StageModule) -> dict[str, Parameters]:
    """Of each network of a stage that is ready to be trained, hidden ones included."""
    found = {}
    for name, network in module.named_children():
        numbers = [(p.numel(), p.requires_grad) for p in network.parameters()]
        trained = sum(n for n, is_trained in numbers if is_trained)
        found[name] = Parameters(trained, sum(n for n, _ in numbers) - trained)
    for network in hidden_networks(module):
        number = sum(p.numel() for p in network.parameters())
        found[type(network).__name__] = Parameters(0, number)
    return {name: numbers for name, numbers in found.items() if sum(numbers)}


def ready(module: StageModule) -> StageModule:
    """A copy without content, as it is when training starts."""
    module = copy.deepcopy(module).to("meta")
    module.setup("fit")
    return module


def estimate_memory(
    module: StageModule,
    *,
    image_shape: Sequence[int],
    share: int,
    num_batches: int,
    samples: int,
    precision: str,
    accelerator: str,
) -> MemoryEstimate:
    """What a stage needs on one device that is alone.

    Args:
        module: see `ready`.
        share: images of a batch that one device has.
        samples: drawn at once in validation, each with and without its class.
        others: see `rehearse`.
    """
    optimizers = as_list(module.configure_optimizers())
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    weights, gradients = size_of([module.network]), bytes_of(trained)
    average = size_of([getattr(module, module.average_name)]) if module.ema_decay > 0 else 0
    rehearsed = rehearse(module, image_shape, share, num_batches, precision, accelerator)
    moments = sum(moments_of(optimizer) for optimizer in optimizers)
    others = size_of([module]) - weights - average + size_of(hidden_networks(module))
    return MemoryEstimate(
        weights=weights,
        average=average,
        moments=moments,
        others=others,
        gradients=gradients,
        kept=rehearsed.kept,
        step=rehearsed.most,
        sampling=cache_of(module.network, samples),
        whole=0,
        checkpoint=bytes_of(module.state_dict().values()) + moments,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size_of(networks: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of networks."""
    return sum(bytes_of([*n.parameters(), *n.buffers()]) for n in networks)


def moments_of(optimizer: Optimizer) -> int:
    """Bytes of the state of an optimizer of meta tensors after its first step, which is taken."""
    for group in optimizer.param_groups:
        group.update({name: False for name in ("foreach", "fused") if name in group})
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return bytes_of([value for value in states if isinstance(value, Tensor)])


def hidden_networks(module: nn.Module) -> list[nn.Module]:
    """Networks that look on, which no checkpoint has; see `Frozen`."""
    held = [value for m in module.modules() for value in vars(m).values()]
    return [value.network for value in held if isinstance(value, Frozen)]


def cache_of(network: nn.Module, samples: int) -> int:
    """Bytes of the keys and values of samples, each with and without its class."""
    make_cache = getattr(network, "make_cache", None)
    if make_cache is None:
        return 0
    with torch.device("meta"):
        cache = make_cache(2 * samples)
    return bytes_of([cache.keys, cache.values])


def device_memory(accelerator: str, devices: int) -> int | None:
    """Bytes that a process has here for itself; None where the device is on another machine."""
    if accelerator == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None
