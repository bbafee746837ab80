"""Several processes that share one job: started here, by torchrun, or by Slurm.

`joined` is for programs that only share work out; training has Lightning's Trainer for it.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from var_exp.distributed.rank import is_interactive, is_main_process


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
    def is_main_process(self) -> bool:
        return self.rank == 0

    def tell(self, found: Callable[[], Any]) -> Any:
        """What the first process finds, plain data, in all of them."""
        said = [found() if self.is_main_process else None]
        if self.size > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def part(self) -> None:
        """Wait for all, and work alone from here on."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def resolve_device(name: str) -> torch.device:
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
def process_group(device: torch.device, devices: int, num_nodes: int) -> Iterator[Processes]:
    """The processes of this job, of which this is one; they part at the end of the block.

    Args:
        device: of what kind each has one.
        devices, num_nodes: processes on a machine, and machines. Under torchrun, which has
            decided, its numbers count.
    """
    given = given_by_torchrun()
    devices, num_nodes = given.get("devices", devices), given.get("num_nodes", num_nodes)
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
    except BaseException:
        # They would wait for this one; `launch` has just made this launcher.
        for child in fabric.strategy.launcher.procs:  # type: ignore[union-attr]
            child.kill()
        raise


# -- what the launcher of several processes says ------------------------------------------------

START = "VAR_EXP_START"  # names the run folder, where the command line does not


def given_by_torchrun() -> dict[str, int]:
    """`devices` (processes on a machine) and `num_nodes` as torchrun has decided; else nothing."""
    if not dist.is_torchelastic_launched():
        return {}
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": devices, "num_nodes": int(os.environ["WORLD_SIZE"]) // devices}


def agree_on_start() -> None:
    """Let processes that torchrun or Slurm started together have one name for their start.

    Each alone would take the time at which it came so far, and they would write to two folders.
    A job that is started again, by torchrun after a failure or from Slurm's queue, has the name
    that it had before, and so it goes on.
    """
    if dist.is_torchelastic_launched():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        store = dist.TCPStore(host, port, is_master=False)  # torchrun's own
        os.environ[START] = store.compare_set(START, "", now).decode()
    elif "SLURM_STEP_ID" in os.environ and not is_interactive():
        os.environ[START] = f"job_{os.environ['SLURM_JOB_ID']}_{os.environ['SLURM_STEP_ID']}"


def name_of_start() -> str | None:
    """What all starts of a job have in common, by torchrun or from Slurm's queue; else None."""
    return os.environ.get(START) or os.environ.get("SLURM_JOB_ID")


def is_started_again() -> bool:
    """Whether torchrun or Slurm has started this job before."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(count, 0)) for count in counts)


def check_meeting_point(num_processes: int, num_nodes: int) -> None:
    """Raise ValueError where several processes would not find each other.

    Machines that nobody starts together wait for each other without end; so do processes at a
    port that another program uses. That is found by the first one, before it starts others.
    """
    started_together = "SLURM_JOB_ID" in os.environ or dist.is_torchelastic_launched()
    if num_nodes > 1 and not started_together and "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"num_nodes: {num_nodes} machines have to be started together, by srun or torchrun ("
            f"docs/scale.md), or each with MASTER_ADDR, MASTER_PORT and NODE_RANK in its "
            f"environment; this one was started alone"
        )
    port = os.environ.get("MASTER_PORT")
    alone = num_processes == 1 or not is_main_process() or dist.is_torchelastic_launched()
    if alone or port is None:
        return
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", int(port)))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT: the processes cannot meet at port {port} ({error.strerror}); give "
                f"all of them another one (MASTER_PORT=...)"
            ) from None


def check_tasks(devices: int | str, num_nodes: int) -> None:
    """Raise ValueError unless Slurm has started the processes that a job is for.

    Each of too many would do the whole of the work, in one folder; too few would wait for the rest.

    Args:
        devices, num_nodes: of the job: on a machine, and machines. Of devices that are found, not
            named, nothing is known yet.
    """
    if "SLURM_NTASKS" not in os.environ or dist.is_torchelastic_launched():
        return
    # Of the step that srun has started; whatever was not started by it is alone.
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{n}", 1)) for n in ("TASKS", "NODES"))
    if is_interactive():
        if os.environ["SLURM_JOB_NAME"] == "interactive" and tasks > 1:  # of srun within salloc
            raise ValueError(
                f"devices: Slurm has started {tasks} processes, each of which takes itself for the "
                f"only one, as in a shell, since their job is called 'interactive'; type "
                f"SLURM_JOB_NAME=train srun ..."
            )
        return
    named = type(devices) is int and devices > 0
    even = tasks == 1 or "SLURM_NTASKS_PER_NODE" in os.environ  # else lightning refuses
    if not even or nodes != num_nodes or named and tasks != devices * num_nodes:
        raise ValueError(
            f"devices: Slurm has started {tasks} processes on {nodes} machines, this job is for "
            f"{devices} devices on each of {num_nodes} machines; type srun --nodes={num_nodes} "
            f"--ntasks-per-node={devices}, or other devices and num_nodes"
        )
