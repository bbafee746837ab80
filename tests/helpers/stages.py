"""Small stages on the digits, run through `fit_stage` as train.py does, and killed at will."""

import functools

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import AdamW

from helpers.tiny import tiny_quantizer, tiny_tokenizer
from var_exp.checkpoint.checkpoint import read_checkpoint
from var_exp.data import ImageDataModule
from var_exp.tokenizer.losses import ReconstructionLoss
from var_exp.training import TokenizerModule, VARModule
from var_exp.training.fit import StageSchedule, fit_stage
from var_exp.training.optim import CosineSchedule
from var_exp.transformer import VAR

NUM_BATCHES = 8
PATCH_NUMS = [1, 2, 8]  # stride 2 of the tiny tokenizer, 16 px of the digits


class SignalHandler(Exception):
    pass


class Interrupt(Callback):
    """Raise before a batch, as a kill would come."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, i):
        if trainer.datamodule.num_batches and progress(trainer) == self.batch:
            raise SignalHandler


class Losses(Callback):
    """What the module reported as its loss at each batch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, i):
        self.seen[progress(trainer)] = module.figures["train/loss"].item()


class Validations(Callback):
    """At which batch the stage was validated, and with what result."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, module):
        if trainer.state.fn == "fit":
            metric = {"tokenizer": "val/psnr", "var": "val/loss"}[module.stage]
            self.seen.append((progress(trainer), trainer.callback_metrics[metric].item()))


def progress(trainer):
    return next(c for c in trainer.callbacks if type(c).__name__ == "BatchProgress").batch


def make_module(stage, dropout=0.2, loss=None, quantizer_dropout=0.3, **changes):
    """A module of tiny networks; `changes` are arguments of the module."""
    torch.manual_seed(0)
    quantizer = tiny_quantizer(PATCH_NUMS, ema=True, num_phi=1, quantizer_dropout=quantizer_dropout)
    tokenizer = tiny_tokenizer(quantizer, channels=1)
    options = {
        "optimizer": functools.partial(AdamW, lr=3e-3),
        "schedule": CosineSchedule(warmup=0.25),
        "ema_decay": 0.5,
    } | changes
    if stage == "tokenizer":
        return TokenizerModule(tokenizer, loss or ReconstructionLoss(), **options)
    transformer = VAR(
        PATCH_NUMS,
        vocab_size=quantizer.vocab_size,
        code_dim=quantizer.code_dim,
        num_classes=10,
        depth=2,
        width=32,
        num_heads=2,
        dropout=dropout,
    )
    return VARModule(transformer, tokenizer, **{"class_dropout_prob": 0.3} | options)


ONE = {"devices": 1, "precision": "32-true"}


SCHEDULE = ("seed", "batch_size", "val_every", "save_every")
FIT = ("loggers", "resume", "signals")


def run(stage, source, folder, *callbacks, trainer=ONE, codes=None, **changes):
    """Fit a module, up to the end or to a kill: the module, and its losses by batch.

    `changes` are arguments of `fit_stage` and of the module; `codes` a cache to train from.
    """
    lengths = {"seed": 0, "batch_size": 6, "val_every": 3, "num_batches": NUM_BATCHES}
    lengths |= {k: v for k, v in changes.items() if k in SCHEDULE}
    given = {k: v for k, v in changes.items() if k in FIT}
    others = {k: v for k, v in changes.items() if k not in (*SCHEDULE, *FIT)}
    module = make_module(stage, **others)
    options = {"accelerator": "cpu", "enable_model_summary": False} | ONE | trainer
    trainer = functools.partial(L.Trainer, **options)
    losses, data = Losses(), ImageDataModule(source, seed=lengths["seed"])
    data.codes = codes
    try:
        fit_stage(
            module,
            data,
            trainer,
            StageSchedule(**lengths),
            run_dir=folder,
            callbacks=[*callbacks, losses],
            **given,
        )
    except SignalHandler:
        pass
    return module, losses.seen


def weights(folder, stage):
    """Everything that a stage has learned: networks, averages, moments of the optimizers."""
    content = read_checkpoint(folder / stage / "last.ckpt")
    moments = {
        f"{o}.{i}.{k}": v
        for o, optimizer in enumerate(content["optimizer_states"])
        for i, s in optimizer["state"].items()
        for k, v in s.items()
    }
    return content["state_dict"] | moments


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
