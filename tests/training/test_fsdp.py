"""Training by shards is the same training, and its checkpoints are those of one process."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers.command import QUICK, ROOT
from helpers.command import run as command
from helpers.stages import NUM_BATCHES, Interrupt, run, weights
from helpers.together import together
from tests.training.test_tokenizer_module import adversary
from var_exp.checkpoint.checkpoint import load_networks
from var_exp.training.fsdp import Sharded, local

DDP = "ddp_find_unused_parameters_true"
SGD = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
# Nothing that each process draws for itself.
SAME = {"tokenizer": {"quantizer_dropout": 0.0}, "var": {"dropout": 0.0}}


def train(stage, source, folder, *callbacks, strategy=None, size=1, **changes):
    """A stage with all that a recipe may have: its losses by batch."""
    options = {"batch_size": 8, "clip": 0.5, "micro_batch_size": 4 // size, **SAME[stage]}
    if stage == "tokenizer":
        options["adversary"] = adversary()
    trainer = {"precision": changes.pop("precision", "32-true")}
    if strategy:
        trainer |= {"devices": size, "strategy": strategy}
    _, losses = run(stage, source, folder, *callbacks, trainer=trainer, **options | changes)
    return losses


def train_together(stage, source, folder, *callbacks, strategy="fsdp", size=2, **changes):
    """The same on several processes."""
    strategy = Sharded() if strategy == "fsdp" else strategy
    call = functools.partial(train, strategy=strategy, size=size, **changes)
    return together(size, folder / "results", call, stage, source, folder, *callbacks)[0]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_one_process_is_two_is_two_with_shards(stage, digits, tmp_path):
    """With micro-batches, clipping, averages, both optimizers, and a codebook that learns."""
    one = train(stage, digits, tmp_path / "one", optimizer=SGD)
    assert sorted(one) == list(range(1, NUM_BATCHES + 1))
    for strategy in (DDP, "fsdp"):
        folder = tmp_path / strategy
        two = train_together(stage, digits, folder, strategy=strategy, optimizer=SGD)
        assert two == pytest.approx(one, rel=1e-5)
        assert_close(weights(folder, stage), weights(tmp_path / "one", stage))


@pytest.mark.slow
def test_shards_in_mixed_precision_train_as_whole_networks_do(digits, tmp_path):
    ddp, fsdp = (
        train_together("var", digits, tmp_path / name, strategy=name, precision="bf16-mixed")
        for name in (DDP, "fsdp")
    )
    assert fsdp == pytest.approx(ddp, rel=1e-5)
    assert fsdp[NUM_BATCHES] < fsdp[1]


@pytest.mark.parametrize("stage", ["tokenizer", pytest.param("var", marks=pytest.mark.slow)])
def test_what_two_processes_saved_goes_on_on_one_and_on_four(stage, digits, tmp_path):
    """From a checkpoint between validations, when only shards are there."""
    changes = {"val_every": 4, "save_every": 5}
    uninterrupted = train(stage, digits, tmp_path / "whole", **changes)
    train_together(stage, digits, tmp_path / "two", Interrupt(6), **changes)
    changes["resume"] = str(tmp_path / "two" / stage / "last.ckpt")
    rest = {
        1: train(stage, digits, tmp_path / "one", **changes),
        4: train_together(stage, digits, tmp_path / "four", size=4, **changes),
    }
    expected = {batch: uninterrupted[batch] for batch in range(6, NUM_BATCHES + 1)}
    for size in rest:
        assert rest[size] == pytest.approx(expected, rel=1e-5)


class Holdings(Callback):
    """Which share of all numbers each process has at the end of training."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, trainer, module):
        moments = [
            value
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if value.ndim
        ]
        held = {
            "weights": list(module.network.parameters()),
            "averages": list(module.get_submodule(module.average_name).parameters()),
            "moments": moments,
            "tokenizer": list(module.tokenizer.parameters()),
        }
        shares = {
            name: sum(local(t).numel() for t in tensors) / sum(t.numel() for t in tensors)
            for name, tensors in held.items()
        }
        torch.save(shares, self.folder / f"{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def sharded(digits, tmp_path_factory):
    """A folder with a run of stage two by shards, and what each process held of it."""
    folder = tmp_path_factory.mktemp("sharded")
    train_together("var", digits, folder, Holdings(folder))
    return folder


def test_a_sharded_stage_leaves_networks_that_are_read_like_any_other(sharded):
    networks, trained = load_networks(sharded), weights(sharded, "var")
    for name, value in networks.transformer.state_dict().items():
        assert torch.equal(value, trained[f"averaged_transformer.{name}"])
    assert networks.tokenizer.fingerprint() == networks.info["tokenizer_fingerprint"]


def test_each_process_has_its_half_of_weights_averages_and_moments(sharded):
    """And the tokenizer of stage two whole."""
    for rank in range(2):
        shares = torch.load(sharded / f"{rank}.pt")
        assert shares.pop("tokenizer") == 1
        for name, share in shares.items():
            assert share == pytest.approx(0.5, abs=0.05), name


class Poison(Callback):
    """An image that is not finite, in one batch of the last process."""

    def on_train_batch_start(self, trainer, module, batch, i):
        if module.batch == 2 and trainer.global_rank == trainer.world_size - 1:
            batch.images[-1] = math.nan


@pytest.mark.parametrize("strategy", [pytest.param(DDP, marks=pytest.mark.slow), "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(strategy, digits, tmp_path):
    changes = {"optimizer": SGD, "micro_batch_size": None}
    one = train("tokenizer", digits, tmp_path / "one", Poison(), **changes)
    changes["strategy"] = strategy
    two = train_together("tokenizer", digits, tmp_path / "two", Poison(), **changes)
    assert math.isnan(one.pop(3)) and math.isnan(two.pop(3))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_torchrun_gives_one_run_folder_one_log_and_a_checkpoint_that_samples(tmp_path):
    arguments = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", *QUICK]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    assert (folder / "tokenizer" / "best.ckpt").exists() and (folder / "metrics.json").exists()
    assert done.stdout.count("what was reached") == 1
    told = done.stderr.splitlines()
    assert sum(line.startswith("var: batch 4/4") for line in told) == 1
    assert all(line.startswith(("tokenizer: batch", "tokens:", "var:")) for line in told), told
    sampled = command("sample", f"ckpt={folder}", "num_samples=2", f"out_dir={tmp_path / 'out'}")
    assert sampled.code == 0, sampled.err
