"""How many processes load images ahead of training.

Decoding and cropping a photograph takes milliseconds, which an accelerator would spend waiting, so
other processes do it before. How many fit is decided by the cores that this process may use: one
is left for training, the rest load. Whatever the number, batches are the same.
"""

import os
from typing import Annotated, Final, Literal

from annotated_types import Ge, Le

from var_exp.configurable import checked

AUTO: Final = "auto"
MOST = 16  # more seldom help: memory and the disk are the limit by then
Workers = Literal["auto"] | Annotated[int, Ge(0), Le(256)]


def cores_of_process(processes: int = 1) -> int:
    """Cores for each of the processes that train on this machine, at least 1.

    Those that the operating system lets this one use are shared by all. But Slurm gives each task
    cores of its own (where it is asked to, by --cpus-per-task), which only the processes that this
    task has started share.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if own := os.environ.get("SLURM_CPUS_PER_TASK"):
        tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{n}", 1)) for n in ("TASKS", "NODES"))
        cores = min(cores, int(own))
        processes = max(1, processes * nodes // tasks)
    return max(1, cores // processes)


@checked
def number_of_workers(asked: Workers, processes: int = 1) -> int:
    """A number of loading processes as it was asked for, or for "auto" one that fits the machine.

    Args:
        processes: that train on this machine, each of which gets so many.

    Raises:
        ValueError: neither "auto" nor a whole number >= 0.
    """
    return asked if isinstance(asked, int) else min(cores_of_process(processes) - 1, MOST)
