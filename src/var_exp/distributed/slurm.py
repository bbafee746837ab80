"""Jobs of Slurm: how one asks to be started again, and what keeps Hydra from submitting one."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection

from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import Interrupted

SUBMIT = "hydra/launcher=slurm"


def check_submission(arguments: Collection[str], devices: object, num_nodes: object) -> None:
    """End the program, in one line, where a command line cannot submit its jobs.

    Args:
        devices, num_nodes: of a job, as the command line names them.
    """
    try:
        importlib.metadata.version("hydra-submitit-launcher")
        installed = True
    except importlib.metadata.PackageNotFoundError:
        installed = False
    counts = all(type(count) is int and count > 0 for count in (devices, num_nodes))
    problems = {
        "only -m submits jobs, a single one too; add -m": {"-m", "--multirun"} & {*arguments},
        "it is not installed; type pip install 'var-exp[slurm]'": installed,
        "there is no sbatch here; start it on a machine of the cluster": shutil.which("sbatch"),
        f"expected numbers of devices and machines, which Slurm has to be told (trainer.devices=8 "
        f"trainer.num_nodes=2), got {devices!r} and {num_nodes!r}": counts,
    }
    for problem, is_well in problems.items():
        if not is_well:
            sys.exit(f"error: {SUBMIT}: {problem}")


def requeue(stop: Interrupted) -> None:
    """Put this job back into the queue, if Slurm asked it to make room.

    By the signal that `--signal=USR1@300` sends before the time limit, or by SIGTERM where the job
    is preempted; `scancel` sends SIGTERM too, and means the end.
    """
    job = job_id()
    if job is None or not is_main_process():
        return
    if stop.number == signal.SIGUSR1 or stop.number == signal.SIGTERM and is_preempted(job):
        done = scontrol("requeue", job)
        if done.returncode:
            print(f"slurm: job {job} cannot be requeued: {done.stderr.strip()}", file=sys.stderr)


def job_id() -> str | None:
    """The number of the job that this process is part of, as scontrol takes it; None: of none."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def is_preempted(job: str) -> bool:
    """Whether Slurm has given the place of a job to another one."""
    told = dict(word.partition("=")[::2] for word in scontrol("show", "job", job).stdout.split())
    return told.get("PreemptTime", "None") != "None"


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(arguments, 1, "", str(error))
