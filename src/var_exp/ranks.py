"""Which of several processes this one is. One process alone is the first of one."""

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_first() -> bool:
    return rank() == 0


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def share(count: int) -> range:
    """This process's part of `count` things, every world_size-th; it may be empty."""
    return range(rank(), count, world_size())


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, in place of the values."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()
