"""Several processes that share one job: started here, by torchrun, or by Slurm.

For programs that only share work out; training has Lightning's Trainer for it.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Processes(NamedTuple):
    """The processes of a job, as one of them sees them.

    rank: this one's number; the first, 0, is the one that speaks and writes what is shared.
    size: how many there are.
    device: what this one computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def tell(self, found: Callable[[], Any]) -> Any:
        """What the first process finds, plain data, in all of them."""
        said = [found() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def part(self) -> None:
        """Wait for all, and work alone from here on."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the accelerator where there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError):  # no such device, or torch built without it
            raise ValueError(f"device: expected auto, cpu, cuda or mps, got {name!r}") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def check_processes(device: torch.device, devices: int, num_nodes: int) -> None:
    """Raise ValueError for a number of processes that this machine cannot have."""
    for name, count in (("devices", devices), ("num_nodes", num_nodes)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {count!r} ({name}=...)")
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, devices)
    if devices > there:
        raise ValueError(
            f"devices: expected at most the {there} {device.type} devices of this machine, got "
            f"{devices} (devices=...)"
        )


@contextmanager
def joined(device: torch.device, devices: int, num_nodes: int) -> Iterator[Processes]:
    """The processes of this job, of which this is one; they part at the end of the block.

    Args:
        device: of what kind each has one.
        devices, num_nodes: processes on a machine, and machines. Under torchrun, which has
            decided, its numbers count.
    """
    if dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    if devices * num_nodes == 1:
        yield Processes(0, 1, device)
        return
    # Slow to import, and needed here alone.
    from lightning.fabric import Fabric

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy="ddp")
    fabric.launch()
    try:
        yield Processes(fabric.global_rank, fabric.world_size, fabric.device)
    except BaseException as error:
        for child in fabric.strategy.launcher.procs:  # who would wait for this one
            child.kill()
        if isinstance(error, KeyboardInterrupt) and fabric.global_rank > 0:
            os._exit(1)  # the first process says so
        raise
