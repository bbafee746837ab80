"""What a job of Slurm does for itself, and how it is submitted; a stand-in speaks for Slurm."""

import importlib.metadata
import os
import re
import signal

import pytest

from helpers.command import QUICK, composed, run
from var_exp.distributed import slurm
from var_exp.distributed.launch import check_tasks
from var_exp.distributed.signals import Interrupted

NAMES = ("SLURM_", "RANK", "LOCAL_RANK", "TORCHELASTIC")


@pytest.fixture(autouse=True)
def job(monkeypatch):
    """Called with an environment, which is all that a launcher says."""
    for name in list(os.environ):
        if name.startswith(NAMES):
            monkeypatch.delenv(name)
    return lambda **environment: [monkeypatch.setenv(n, str(v)) for n, v in environment.items()]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in, called with what it says and its exit code; the file of what it was told."""
    told = tmp_path / "told"
    told.touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(says="PreemptTime=None", code=0):
        script = tmp_path / "scontrol"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {told}\necho "{says}"\necho no >&2\nexit {code}\n'
        )
        script.chmod(0o755)
        return told

    return make


# -- going back to the queue ------------------------------------------------------------------

PREEMPTED = "JobState=RUNNING Restarts=0 PreemptTime=2030-01-01T00:00:00 SuspendTime=None"
SHOW, REQUEUE = "show job 7", "requeue 7"


@pytest.mark.parametrize(
    ("number", "says", "asked"),
    [
        (signal.SIGUSR1, "", [REQUEUE]),
        (signal.SIGTERM, PREEMPTED, [SHOW, REQUEUE]),
        (signal.SIGTERM, "PreemptTime=None", [SHOW]),  # scancel
        (signal.SIGTERM, "JobState=RUNNING", [SHOW]),
        (signal.SIGINT, PREEMPTED, []),
    ],
)
def test_a_job_goes_back_to_the_queue_where_slurm_wants_its_place(
    number, says, asked, job, scontrol
):
    told = scontrol(says)
    job(SLURM_JOB_ID=7)
    slurm.requeue(Interrupted(number))
    assert told.read_text().splitlines() == asked


def test_a_job_of_an_array_goes_back_alone(job, scontrol):
    told = scontrol()
    job(SLURM_JOB_ID=9, SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=2)
    slurm.requeue(Interrupted(signal.SIGUSR1))
    assert told.read_text().splitlines() == ["requeue 7_2"]


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": 7, "SLURM_PROCID": 1}])
def test_only_the_first_process_of_a_job_asks(environment, job, scontrol):
    told = scontrol()
    job(**environment)
    slurm.requeue(Interrupted(signal.SIGUSR1))
    assert told.read_text() == ""


def test_a_job_that_cannot_go_back_says_so_and_leaves_as_it_would(
    job, scontrol, monkeypatch, capsys
):
    scontrol(code=1)
    job(SLURM_JOB_ID=7)
    slurm.requeue(Interrupted(signal.SIGUSR1))
    assert capsys.readouterr().err == "slurm: job 7 cannot be requeued: no\n"
    monkeypatch.setenv("PATH", "")
    slurm.requeue(Interrupted(signal.SIGUSR1))
    assert "scontrol" in capsys.readouterr().err


# -- as many processes as the trainer has -----------------------------------------------------

STEP = {"SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2}
STEP |= {"SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_NUM_NODES": 2}


@pytest.mark.parametrize("devices", [2, "auto", -1])
def test_processes_that_are_those_of_the_trainer_are_taken(devices, job):
    check_tasks(1, 1)
    job(**STEP)
    check_tasks(devices, 2)


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes"),
    [
        ({}, 1, 1),
        ({}, 4, 1),
        ({}, 1, 2),
        ({}, "auto", 1),
        ({"SLURM_STEP_NUM_TASKS": 1, "SLURM_STEP_NUM_NODES": 1}, 2, 1),
    ],
)
def test_other_numbers_of_processes_than_slurm_has_started_are_refused(
    environment, devices, num_nodes, job
):
    job(**STEP | environment)
    with pytest.raises(ValueError, match="Slurm has started .* processes") as error:
        check_tasks(devices, num_nodes)
    assert f"{devices} devices on each of {num_nodes}" in str(error.value)
    assert f"--ntasks-per-node={devices}" in str(error.value) and "\n" not in str(error.value)


def test_a_number_of_tasks_alone_is_refused(job):
    job(SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2)
    with pytest.raises(ValueError, match="--ntasks-per-node=2"):
        check_tasks(2, 2)


def test_several_devices_outside_of_srun_are_refused(job):
    job(SLURM_NTASKS=4, SLURM_JOB_NAME="var-exp")
    with pytest.raises(ValueError, match="has started 1 processes"):
        check_tasks(2, 1)
    check_tasks(1, 1)  # one process that takes all cores


@pytest.mark.parametrize("shell", [{"SLURM_JOB_NAME": "bash"}, {"TORCHELASTIC_RUN_ID": "1"}])
def test_what_is_started_in_a_shell_or_by_torchrun_is_their_matter(shell, job):
    job(**STEP | shell)
    check_tasks(1, 1)


@pytest.mark.parametrize("program", ["train", "sample"])
def test_the_programs_refuse_it_in_one_line(program, job, tmp_path):
    place = {"train": [f"run_dir={tmp_path}/out"], "sample": ["ckpt=x", f"out_dir={tmp_path}/out"]}
    job(**STEP, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_JOB_ID=7)
    done = run(program, *place[program], *(QUICK if program == "train" else []))
    (line,) = done.errors
    assert done.code == 1 and "4 processes on 2 machines" in line
    assert not (tmp_path / "out").exists()


# -- submitting -------------------------------------------------------------------------------


def test_a_job_that_is_submitted_has_the_shape_of_its_trainer():
    shape = ["trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2"]
    launcher = composed("train", "hydra/launcher=slurm", *shape).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 4, 4)
    assert launcher.additional_parameters.signal == "USR1@300"


def without_its_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("arguments", "lack", "said"),
    [
        ([], None, "add -m"),
        (["-m"], without_its_package, r"type pip install 'var-exp\[slurm\]'"),
        (["-m"], lambda patch: patch.setenv("PATH", ""), "there is no sbatch here"),
        (["-m", "trainer=ddp"], None, r"trainer.devices=8 trainer.num_nodes=2\), got 'auto' and 1"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(arguments, lack, said, tmp_path, monkeypatch):
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if lack:
        lack(monkeypatch)
    done = run("train", *arguments, "hydra/launcher=slurm", f"runs_dir={tmp_path}/runs")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert re.match(f"error: hydra/launcher=slurm: .*{said}", line)
    assert not (tmp_path / "runs").exists()


def test_several_processes_of_a_shells_job_are_refused_and_its_own_is_not(job):
    job(**STEP | {"SLURM_JOB_NAME": "interactive"})
    with pytest.raises(ValueError, match="started 4 processes.*SLURM_JOB_NAME=train srun"):
        check_tasks(2, 2)
    job(SLURM_STEP_NUM_TASKS=1)
    check_tasks(2, 1)  # which starts them itself
