"""A stage on two processes is the stage on one: both optimizers, clipping and micro-batches."""

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from stages import PATCH_NUMS, run, weights
from test_tokenizer_module import adversary
from var_exp.evaluation.classifier import train_classifier
from var_exp.evaluation.evaluator import Evaluator

TWO = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}
SAME = {
    # Nothing that draws or learns in each process for itself.
    "tokenizer": {"freeze": ["codebook"], "scale_drop": 0.0},
    "var": {"dropout": 0.0, "label_drop": 0.0},
}


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_processes_are_one(stage, micro_batch, digits, tmp_path):
    options = SAME[stage] | {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        "clip": 0.5,
        "micro_batch": micro_batch,
    }
    for name, trainer in (("one", {}), ("two", TWO)):
        if stage == "tokenizer":
            options["adversary"] = adversary()
        run(stage, digits, tmp_path / name, trainer=trainer, **options)
    one, two = (weights(tmp_path / name, stage) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), rtol=1e-5, atol=1e-5), name


class Scores(Callback):
    """What the evaluator says after the last validation, written by each process."""

    def __init__(self, evaluator: Evaluator, folder: Path):
        self.evaluator, self.folder = evaluator, folder

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            scores = self.evaluator.score_samples(module.transformer, module.tokenizer, 25, 9)
            scores |= self.evaluator.score_reconstructions(module.tokenizer, 101)
            torch.save(scores, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


def test_two_processes_give_the_scores_of_one(digits, tmp_path, monkeypatch):
    """Also where they cannot share evenly: 25 samples, 101 reconstructions."""
    monkeypatch.setattr("var_exp.evaluation.classifier.NUM_STEPS", 20)
    network = train_classifier(digits)
    for trainer in ({}, TWO):
        evaluator = Evaluator(digits, network, {"cfg_scale": 1.0}, batch_size=8)
        scores = Scores(evaluator, tmp_path)
        name = f"run{trainer.get('devices')}"
        # Networks that learn nothing are the same on both, to the last bit.
        still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), **SAME["var"]}
        run("var", digits, tmp_path / name, scores, val_every=8, trainer=trainer, **still)
    one, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert {"fid_classifier", "rfid_classifier", "inception_score_classifier"} < set(one)
    assert {"class_accuracy_classifier", "class_accuracy_real_classifier"} < set(one)
    assert {f"fid_classifier_scale_{scale}" for scale in PATCH_NUMS} < set(one)
    for scores in both:
        assert scores == pytest.approx(one, rel=1e-6)
