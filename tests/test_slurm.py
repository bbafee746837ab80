"""Jobs of a real Slurm stop in time, go back to the queue and go on as if nothing had happened."""

import subprocess
import sys

import pytest

import cluster
from cluster import Cluster
from command import QUICK, ROOT
from programs import Program, csv_rows
from stages import assert_equal, weights

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing()),
]

# A job of some 400 batches: long enough to be told to stop in the middle of it.
JOB = [
    *QUICK,
    "stages=[tokenizer]",
    "model.tokenizer.num_batches=300",
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


def test_a_job_of_two_nodes_that_is_told_to_stop_requeues_itself_and_goes_on_exactly(
    slurm, submit, whole, tmp_path
):
    job = submit()
    wait_for_training(slurm, job)
    slurm.call("scancel", "--signal=USR1", job)
    slurm.wait(lambda: slurm.about(job).get("Restarts") == "1")
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert said.count("stopped by SIGUSR1") == 1, said
    assert_like(tmp_path / "run", whole, said)


@pytest.mark.slow
def test_the_signal_before_the_time_limit_does_the_same(slurm, submit, tmp_path):
    longer = ["model.tokenizer.num_batches=1500", "model.tokenizer.val_every=750"]
    code, said = Program(tmp_path / "whole", *JOB, *ALONE, *longer).end()
    assert code == 0, said
    # Slurm sends it up to a minute early, so that a job of two minutes may get it at once.
    job = submit("--time=2", "--signal=USR1@60", arguments=longer)
    slurm.wait(lambda: int(slurm.about(job).get("Restarts", 0)) >= 1)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
    assert "stopped by SIGUSR1" in said, said
    assert_like(tmp_path / "run", tmp_path / "whole" / "run", said)


def test_a_preempted_job_makes_room_and_goes_on_exactly(slurm, submit, whole, tmp_path):
    job = submit()
    wait_for_training(slurm, job)
    urgent = slurm.submit(
        *("-p", "urgent", "-N", "2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 5")
    )
    slurm.wait(lambda: slurm.state(urgent) in ("RUNNING", ""))
    assert slurm.state(job) in ("PENDING", "COMPLETING", "CONFIGURING")
    slurm.wait_for_end(job)
    said = log_of(slurm, job)
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


def test_a_sweep_is_one_job_for_each_point(slurm, tmp_path):
    # Without accounting submitit cannot ask sacct; squeue knows the same.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sacct").write_text(
        "#!/bin/bash\necho 'JobID|State|NodeList'\nsqueue -h -r -o '%i|%T|%N' -t all\n"
    )
    (tmp_path / "bin" / "sacct").chmod(0o755)
    short = [o for o in QUICK if "num_batches" not in o] + ["model.tokenizer.num_batches=4"]
    command = [sys.executable, "train.py", "-m", "hydra/launcher=slurm", "seed=0,1", *short]
    command += ["stages=[tokenizer]", "hydra.launcher.gpus_per_node=null", f"runs_dir={tmp_path}"]
    command += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    path = {"PATH": f"{tmp_path}/bin:{slurm.environment['PATH']}"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=slurm.environment | PLACE | path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout + slurm.logs()
    folders = sorted(path.parent for path in tmp_path.rglob("metrics.json"))
    assert [folder.name for folder in folders] == ["0", "1"]
    jobs = {path.name for path in tmp_path.glob("digits/*/.submitit/[0-9]*_[01]")}
    assert len(jobs) == 2 and len({name.partition("_")[0] for name in jobs}) == 1  # of one array
