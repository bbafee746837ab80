"""The CSV file of an interrupted run goes on; pictures reach every logger that takes them."""

import csv

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from wandb import teardown

from helpers.stages import run
from var_exp.training.loggers.csv import ContinuedCSVLogger
from var_exp.training.loggers.guarded import FaultTolerantLogger, log_picture
from var_exp.training.loggers.tensorboard import ImageTensorBoardLogger
from var_exp.training.loggers.wandb import ContinuedWandbLogger
from var_exp.training.resume import forget


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_continued_csv_file_keeps_its_rows_and_takes_new_columns(tmp_path):
    for step, metrics in ((0, {"loss": 3.0}), (1, {"loss": 2.0, "acc": 0.5})):
        logger = ContinuedCSVLogger(tmp_path, name="csv", version="var")
        logger.log_metrics(metrics, step)
        logger.save()
    found = rows(tmp_path / "csv" / "var" / "metrics.csv")
    assert [(r["step"], r["loss"], r["acc"]) for r in found] == [
        ("0", "3.0", ""),
        ("1", "2.0", "0.5"),
    ]


class FakeTrainer:
    def __init__(self, *loggers):
        self.loggers = loggers


def test_pictures_reach_every_logger(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    place = {"save_dir": str(tmp_path / "runs" / "x"), "version": "var"}
    board = ImageTensorBoardLogger(name="tensorboard", **place)
    wandb = ContinuedWandbLogger(project="test", **place)
    plain = ContinuedCSVLogger(name="csv", **place)
    log_picture(FakeTrainer(board, wandb, plain), "val/samples", np.zeros((8, 8, 3), np.uint8), 7)
    board.experiment.flush()
    wandb.experiment.finish()
    run_dir = tmp_path / "runs" / "x"
    assert list((run_dir / "tensorboard").rglob("events.out.tfevents*"))
    assert list((run_dir / "wandb").rglob("media/images/val/samples*.png"))
    assert (run_dir / "var" / "pictures" / "samples_000008.png").exists()


def test_a_restart_goes_on_in_the_same_wandb_run_and_a_new_start_in_another(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for anew in (False, False, True):
        logger = ContinuedWandbLogger(str(tmp_path), "var", project="test")
        if anew:
            forget(tmp_path, "var")
        ids.append(logger.experiment.id)
        logger.finish()
    assert ids[0] == ids[1] != ids[2]


def test_wandb_goes_offline_where_it_cannot_be_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("var_exp.training.loggers.wandb.SECONDS_TO_CONNECT", 1)
    teardown()  # W&B remembers the mode of runs before
    logger = ContinuedWandbLogger(str(tmp_path), "var", project="test")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finish()
    assert "logged offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_half_written_row_is_cut_off(tmp_path):
    path = tmp_path / "csv" / "var" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("loss,step\n3.0,0\n2.0")
    logger = ContinuedCSVLogger(tmp_path, name="csv", version="var")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    assert [(r["step"], r["loss"]) for r in rows(path)] == [("0", "3.0"), ("1", "1.0")]


class Broken(Logger):
    """Fails at everything, as on a full disk."""

    def __init__(self, save_dir, version):
        super().__init__()

    name = version = experiment = property(lambda self: self.log_metrics())

    def log_metrics(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    log_hyperparams = log_image = save = finalize = log_metrics


def refuses_to_start(save_dir, version):
    raise RuntimeError("no network")


@pytest.mark.parametrize("make, reason", [(Broken, "No space left"), (refuses_to_start, "network")])
@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_a_logger_that_fails_is_reported_once_and_training_goes_on(
    make, reason, stage, digits, tmp_path, capsys
):
    _, losses = run(stage, digits, tmp_path / "broken", loggers=[make])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logger:")]
    assert len(told) == 1 and reason in told[0] and "training goes on" in told[0]
    assert losses == run(stage, digits, tmp_path / "none")[1]


def test_an_interruption_is_no_failure_of_a_logger(tmp_path):
    class Interrupted(Broken):
        def log_metrics(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FaultTolerantLogger(Interrupted, str(tmp_path), "var").log_metrics({"loss": 1.0}, 0)
