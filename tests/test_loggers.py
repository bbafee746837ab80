"""The CSV file of an interrupted run goes on; pictures reach every logger that takes them."""

import csv

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from var_exp.training.loggers import ContinuedCSVLogger, log_picture, wandb_logger


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


def test_pictures_reach_tensorboard_and_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    board = TensorBoardLogger(tmp_path, name="tensorboard")
    wandb = wandb_logger(str(tmp_path / "runs" / "x"), "var", project="test")
    plain = ContinuedCSVLogger(tmp_path, name="csv")
    log_picture(FakeTrainer(board, wandb, plain), "val/samples", np.zeros((8, 8, 3), np.uint8), 7)
    board.experiment.flush()
    wandb.experiment.finish()
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents*"))
    assert list((tmp_path / "runs").rglob("media/images/val/samples*.png"))
