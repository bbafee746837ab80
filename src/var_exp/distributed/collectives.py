"""Which of several processes this one is. One process alone is the first of one."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return rank() == 0


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def share(count: int) -> range:
    """This process's part of `count` things, every world_size-th; it may be empty."""
    return range(rank(), count, world_size())


def common_batches(count: int, batch_size: int) -> int:
    """How many batches every process has, where `share` splits `count` things."""
    return math.ceil(count // world_size() / batch_size)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, in place of the values."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest value of all processes; each has a device of the kind that they talk by."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def broadcast(values: Tensor) -> Tensor:
    """The values of the first process in all of them, in place."""
    if is_distributed():
        dist.broadcast(values, src=0)
    return values


def all_gather(values: Tensor) -> Tensor:
    """What all processes have of a batch, in the order that it has in one process.

    Each has every world_size-th image: (B / world_size, ...) -> (B, ...), without gradient.
    """
    if not is_distributed():
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts, dim=1).flatten(0, 1)


def scatter(values: Tensor) -> Tensor:
    """This process's every world_size-th row; the inverse of `all_gather`."""
    return values[rank() :: world_size()]


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
