"""What a job of Slurm does for itself: ask to be started again."""

import os
import signal
import subprocess
import sys

from var_exp.interruption import Interrupted, is_first


def requeue(stop: Interrupted) -> None:
    """Put this job back into the queue, if Slurm asked it to make room.

    By the signal that `--signal=USR1@120` sends before the time limit, or by SIGTERM where the job
    is preempted; `scancel` sends SIGTERM too, and means the end.
    """
    job = job_id()
    if job is None or not is_first():
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
