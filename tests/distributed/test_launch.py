"""Several processes are one job: one folder, one voice, and the scores of one process.

That they train alike is in test_sharding.py.
"""

import functools
import os
import socket
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from helpers.command import QUICK, composed
from helpers.command import run as command
from helpers.stages import PATCH_NUMS, run
from helpers.together import together
from var_exp.distributed.launch import START, agree_on_start, given_by_torchrun
from var_exp.distributed.signals import RESUME_HINT
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.networks.classifier import train_classifier
from var_exp.experiment.entry import leave_with_the_others
from var_exp.experiment.errors import is_of_another_process, should_report
from var_exp.experiment.run import Run

TWO = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}


class Scores(Callback):
    """What the evaluator says after the last validation, written by each process."""

    def __init__(self, evaluator: Evaluator, folder: Path):
        self.evaluator, self.folder = evaluator, folder

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            scores = self.evaluator.score_samples(module.transformer, module.tokenizer, 25, 9)
            scores |= self.evaluator.score_reconstructions(module.tokenizer, 101)
            torch.save(scores, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


def measure(source, folder: Path, scores: Scores, trainer: dict) -> None:
    """Of networks that learn nothing, and so are the same on both, to the last bit."""
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "dropout": 0.0}
    run("var", source, folder, scores, val_every=8, trainer=trainer, **still)


def test_two_processes_give_the_scores_of_one(digits, tmp_path, monkeypatch):
    """Also where they cannot share evenly: 25 samples, 101 reconstructions."""
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 20)
    network = train_classifier(digits)
    scores = Scores(Evaluator(digits, network, {"cfg_scale": 1.0}, batch_size=8), tmp_path)
    measure(digits, tmp_path / "one", scores, {})
    together(2, tmp_path / "results", measure, digits, tmp_path / "two", scores, TWO)
    one, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert {"fid_classifier", "rfid_classifier", "inception_score_classifier"} < set(one)
    assert {"class_accuracy_classifier", "class_accuracy_real_classifier"} < set(one)
    assert {f"fid_classifier_scale_{scale}" for scale in PATCH_NUMS} < set(one)
    for scores in both:
        assert scores == pytest.approx(one, rel=1e-6)


# -- what started them ----------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Called with an environment, of which nothing is left at the end."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC", "SLURM")
    for name in [*os.environ, START]:
        if name.startswith((*launchers, START)):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(START, "")  # so that it is taken back whoever sets it
    monkeypatch.delenv(START)
    return lambda **environment: [monkeypatch.setenv(n, str(v)) for n, v in environment.items()]


def test_processes_of_torchrun_take_the_start_of_whoever_came_first(launched):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    launched(TORCHELASTIC_RUN_ID="none", **address)
    agree_on_start()
    first = os.environ.pop(START)
    assert first.startswith("20") and store.get(START).decode() == first
    store.set(START, "earlier")
    agree_on_start()
    assert os.environ[START] == "earlier"


def test_processes_of_srun_are_named_by_their_job_and_step(launched):
    launched(SLURM_JOB_ID=7, SLURM_STEP_ID=2, SLURM_STEP_NUM_TASKS=4)
    agree_on_start()
    assert os.environ[START] == "job_7_2"


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": 7}, {"SLURM_STEP_NUM_TASKS": 1}])
def test_a_process_that_is_alone_is_named_by_its_time(environment, launched):
    launched(**environment)
    agree_on_start()
    assert START not in os.environ


def test_the_run_folder_has_the_name_that_was_agreed_on(launched):
    launched(**{START: "job_7_2"})
    composed.cache_clear()
    assert composed("train").run_dir == "runs/digits/job_7_2"
    composed.cache_clear()


def test_torchruns_numbers_of_processes_count(launched):
    assert given_by_torchrun() == {}
    launched(TORCHELASTIC_RUN_ID="none", LOCAL_WORLD_SIZE=8, WORLD_SIZE=32)
    assert given_by_torchrun() == {"devices": 8, "num_nodes": 4}


@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, True), ({"RANK": 8, "LOCAL_RANK": 0}, True), ({"LOCAL_RANK": 1}, False)]
    + [({"SLURM_LOCALID": 0, "SLURM_PROCID": 8}, True), ({"SLURM_LOCALID": 3}, False)],
)
def test_one_process_of_each_machine_says_what_is_wrong(environment, said, launched):
    launched(**environment)
    assert should_report() == said


@pytest.mark.parametrize("started_by", ["train.py", "hand"])
def test_a_port_in_use_is_refused_before_other_processes_wait_there(started_by, launched, tmp_path):
    by_hand = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2} if started_by == "hand" else {}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **by_hand)
        two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
        done = command("train", *two, f"run_dir={tmp_path / 'run'}")
    (line,) = done.errors
    assert f"MASTER_PORT: the processes cannot meet at port {port}" in line and done.code == 1


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_batch_that_processes_cannot_share_is_refused_before_training(trainer, tmp_path):
    here = ["trainer.accelerator=cpu", "trainer.devices=3", "trainer.num_nodes=2"]
    lengths = ["model.tokenizer.batch_size=12", "model.var.batch_size=16"]
    done = command("train", f"trainer={trainer}", *here, *lengths, f"run_dir={tmp_path / 'run'}")
    (line,) = done.errors
    assert "model.var: the global batch of 16 images does not divide by 6 processes" in line
    assert "set model.var.batch_size to 12 or 18" in line and done.code == 1
    assert not (tmp_path / "run").exists()


def test_what_was_seen_of_the_end_of_another_process_is_told(tmp_path, capsys):
    run = Run(tmp_path, OmegaConf.create({}))  # of a program that the same command resumes
    try:
        try:
            raise ValueError("the true cause")
        except ValueError as cause:
            raise RuntimeError("gloo: Connection closed by peer") from cause
    except RuntimeError as error:
        assert is_of_another_process(error)
        assert leave_with_the_others(run, error) == 1
    assert (
        f"whole; {RESUME_HINT} (seen here: ValueError: the true cause)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("program", ["train", "sample"])
def test_machines_that_nobody_starts_together_do_not_wait_for_each_other(
    program, trained, tmp_path
):
    options = {
        "train": [*QUICK, f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}", "trainer.num_nodes=2"],
        "sample": [f"ckpt={trained}", f"out_dir={tmp_path}/out", "num_nodes=2"],
    }
    done = command(program, *options[program])
    (line,) = done.errors
    assert line.startswith("error: num_nodes: 2 machines have to be started together")
    assert (
        done.code == 1 and not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.glob("out/*"))
    )
