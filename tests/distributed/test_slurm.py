"""Jobs of a real Slurm stop in time, go back to the queue and go on as if nothing had happened."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from helpers import cluster
from helpers.cluster import Cluster
from helpers.command import QUICK, ROOT
from helpers.programs import Program, csv_rows, is_in
from helpers.stages import assert_equal, weights

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing()),
]

# Long enough to be told to stop in the middle of it.
JOB = [
    *QUICK,
    "stages=[tokenizer]",
    "model.tokenizer.num_batches=200",
    "model.tokenizer.val_every=100",
    "trainer.precision=32-true",
]
ALONE = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]  # without a cluster
PLACE = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = Program(folder, *JOB, *ALONE).end()
    assert code == 0, said
    return folder / "run"


@pytest.fixture
def submit(slurm, tmp_path):
    """Submit the documented script for two nodes of one task each, with a run folder of its own."""
    script = (ROOT / "docs" / "train.sbatch").read_text()
    here = script.replace("srun ", f"cd {ROOT}\nsrun ").replace("python", sys.executable)
    (tmp_path / "train.sbatch").write_text(here)

    def submitted(*options, run_dir=tmp_path / "run", arguments=()):
        shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        return slurm.submit(
            *shape,
            f"--output={slurm.root}/%x_%j.log",
            *options,
            str(tmp_path / "train.sbatch"),
            *JOB,
            "trainer.accelerator=cpu",
            f"run_dir={run_dir}",
            f"runs_dir={tmp_path}",
            *arguments,
            **PLACE,
        )

    return submitted


def log_of(slurm, job):
    path = slurm.root / f"var-exp_{job}.log"
    return path.read_text() if path.exists() else ""


def wait_for_training(slurm, job):
    slurm.wait(lambda: "tokenizer: batch" in log_of(slurm, job))


def assert_like(run_dir, whole, said):
    assert (run_dir / "metrics.json").exists(), said
    assert_equal(weights(run_dir, "tokenizer"), weights(whole, "tokenizer"))
    assert csv_rows(run_dir, "tokenizer") == csv_rows(whole, "tokenizer")


def programs(slurm, job):
    return slurm.processes_of(job, sys.executable)


def test_a_job_of_two_nodes_that_is_told_to_stop_requeues_itself_and_goes_on_exactly(
    slurm, submit, whole, tmp_path
):
    job = submit()
    # First while it imports its libraries, then in the middle of training.
    slurm.wait(lambda: len(programs(slurm, job)) == 2)
    for pid in programs(slurm, job):
        slurm.wait(partial(is_in, "SigCgt", pid, signal.SIGUSR1))
    assert "batch" not in log_of(slurm, job)
    for restarts in ("1", "2"):
        slurm.call("scancel", "--signal=USR1", job)
        slurm.wait(lambda n=restarts: slurm.about(job).get("Restarts") == n)
        if restarts == "1":
            wait_for_training(slurm, job)
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert said.count("stopped by SIGUSR1") == 2, said
    assert slurm.about(job)["ExitCode"] == "0:0"
    assert_like(tmp_path / "run", whole, said)


def test_the_signal_before_the_time_limit_does_the_same(slurm, submit, whole, tmp_path):
    job = submit("--time=60", "--signal=USR1@300")
    wait_for_training(slurm, job)
    # Slurm looks at its clock twice a minute: the job waits for it in the middle of training, until
    # it is continued by Slurm together with the signal.
    for pid in programs(slurm, job):
        os.kill(pid, signal.SIGSTOP)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    slurm.wait(lambda: slurm.about(job).get("Restarts") == "1")
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert said.count("stopped by SIGUSR1") == 1, said
    assert_like(tmp_path / "run", whole, said)


@pytest.mark.parametrize("grace", [60, pytest.param(0, marks=pytest.mark.slow)])
def test_a_preempted_job_makes_room_and_goes_on_exactly(grace, slurm, submit, whole, tmp_path):
    slurm.call("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    job = submit()
    wait_for_training(slurm, job)
    urgent = slurm.submit(
        *("-p", "urgent", "-N", "2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 5")
    )
    slurm.wait(lambda: slurm.state(urgent) in ("RUNNING", ""))
    assert slurm.state(job) in ("PENDING", "COMPLETING", "CONFIGURING")
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert slurm.about(job)["Restarts"] == "1", said
    assert "stopped by SIGTERM" in said, said
    assert_like(tmp_path / "run", whole, said)


def test_a_cancelled_job_saves_and_stays_away(slurm, submit, tmp_path):
    job = submit()
    wait_for_training(slurm, job)
    slurm.call("scancel", job)
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert "stopped by SIGTERM" in said, said
    assert slurm.about(job)["Restarts"] == "0"
    assert (tmp_path / "run" / "tokenizer" / "last.ckpt").exists()


@pytest.fixture
def sacct(tmp_path):
    """A folder with a stand-in, as without accounting there is none; squeue knows the same."""
    program = tmp_path / "bin" / "sacct"
    program.parent.mkdir()
    squeue = "squeue -h -r -o '%i|%T|%N' -t all"
    program.write_text(f"#!/bin/bash\necho 'JobID|State|NodeList'\n{squeue}\n")
    program.chmod(0o755)
    return program.parent


def test_a_sweep_is_one_job_for_each_point_which_goes_on_exactly_too(slurm, sacct, tmp_path):
    # Two points that train alike, each on two nodes. One of them is told to stop.
    command = [sys.executable, "train.py", "-m", "hydra/launcher=slurm", "sampling.top_k=1,2", *JOB]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1"]
    command += ["trainer.num_nodes=2", "hydra.launcher.gpus_per_node=null", f"runs_dir={tmp_path}"]
    command += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=20"]
    environment = slurm.environment | PLACE | {"PATH": f"{sacct}:{slurm.environment['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def log():
        return "".join(p.read_text() for p in tmp_path.glob("digits/*/.submitit/*_0/*_0_log.out"))

    slurm.wait(lambda: "tokenizer: batch" in log() or launcher.poll() is not None)
    jobs = slurm.call("squeue", "-h", "-r", "-o", "%F %i").split()
    array, points = jobs[0], sorted(jobs[1::2])
    assert points == [f"{array}_0", f"{array}_1"], log()
    slurm.call("scancel", "--signal=USR1", f"{array}_0")
    said, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, said + log()
    assert log().count("stopped by SIGUSR1") == 1, log()
    folders = sorted(path.parent for path in tmp_path.rglob("metrics.json"))
    assert [folder.name for folder in folders] == ["0", "1"]
    assert_like(*folders, log())
