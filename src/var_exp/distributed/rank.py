"""Which process of a run this is; without torch, since signals are handled before its import."""

import os
import sys


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes for all processes of a run.

    This is rank 0 of torch.distributed once that is initialized. Before, the launcher's variables
    decide: RANK (torchrun), SLURM_PROCID (srun), or LOCAL_RANK together with NODE_RANK or
    GROUP_RANK (machines that are started by hand, and processes that Lightning starts).
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    for name in ("RANK", *(() if is_interactive() else ("SLURM_PROCID",))):
        if name in os.environ:
            return int(os.environ[name]) == 0
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return int(node) == int(os.environ.get("LOCAL_RANK", "0")) == 0


def is_interactive() -> bool:
    """Return whether this is a shell within a Slurm allocation, in which much may be started.

    Slurm's variables then describe the shell, not the processes that it starts.
    """
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
