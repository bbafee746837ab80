"""A stage that was interrupted and continued is the stage that never was; the same seed twice
gives the same weights; the checkpoint is a complete generator of plain data."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import AdamW

from tiny import tiny_quantizer, tiny_tokenizer
from var_exp.checkpoint import KEY, load_networks, read_checkpoint
from var_exp.data import Digits, ImageDataModule
from var_exp.tokenizer.losses import ReconstructionLoss
from var_exp.training import TokenizerModule, VARModule
from var_exp.training.fit import fit_stage, progress_in
from var_exp.training.optim import CosineSchedule
from var_exp.training.tokenizer_module import perplexity, usage
from var_exp.transformer import VAR

NUM_BATCHES = 8
PATCH_NUMS = [1, 2, 8]  # stride 2 of the tiny tokenizer, 16 px of the digits


class Interruption(Exception):
    pass


class Interrupt(Callback):
    """Raise before a batch, as a kill would come."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, i):
        if trainer.datamodule.num_batches and progress(trainer) == self.batch:
            raise Interruption


class Losses(Callback):
    """What the module reported as its loss at each batch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, i):
        name = "train/loss"
        self.seen[progress(trainer)] = trainer.callback_metrics[name].item()


def progress(trainer):
    return next(c for c in trainer.callbacks if type(c).__name__ == "BatchProgress").batch


@pytest.fixture(scope="module")
def digits():
    source = Digits()
    source.setup()
    return source


def make_module(stage):
    torch.manual_seed(0)
    quantizer = tiny_quantizer(PATCH_NUMS, ema=True, num_phi=1, scale_drop=0.3)
    tokenizer = tiny_tokenizer(quantizer, channels=1)
    options = {
        "optimizer": functools.partial(AdamW, lr=3e-3),
        "schedule": CosineSchedule(warmup=0.25),
        "average_decay": 0.5,
    }
    if stage == "tokenizer":
        return TokenizerModule(tokenizer, ReconstructionLoss(), **options)
    transformer = VAR(
        PATCH_NUMS,
        vocab_size=quantizer.vocab_size,
        code_dim=quantizer.code_dim,
        num_classes=10,
        depth=2,
        width=32,
        num_heads=2,
        dropout=0.2,
    )
    return VARModule(transformer, tokenizer, label_drop=0.3, **options)


class Validations(Callback):
    """At which batch the stage was validated, and with what result."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, module):
        if trainer.state.fn == "fit":
            metric = {"tokenizer": "val/psnr", "var": "val/loss"}[module.stage]
            self.seen.append((progress(trainer), trainer.callback_metrics[metric].item()))


def run(stage, source, folder, *callbacks, seed=0, val_every=3):
    module = make_module(stage)
    trainer = functools.partial(L.Trainer, accelerator="cpu", devices=1, enable_model_summary=False)
    losses = Losses()
    try:
        fit_stage(
            module,
            ImageDataModule(source, seed=seed),
            trainer,
            run_dir=folder,
            batch_size=6,
            num_batches=NUM_BATCHES,
            val_every=val_every,
            seed=seed,
            callbacks=[*callbacks, losses],
        )
    except Interruption:
        pass
    return module, losses.seen


def weights(folder, stage):
    content = read_checkpoint(folder / stage / "last.ckpt")
    optimizer = content["optimizer_states"][0]["state"]
    moments = {f"{i}.{k}": v for i, s in optimizer.items() for k, v in s.items()}
    return content["state_dict"] | moments


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
@pytest.mark.parametrize("kills", [(5, 7), (3, 6), (1, 2), (4, 4)], ids=str)
def test_interrupted_twice_and_continued_equals_uninterrupted(stage, kills, digits, tmp_path):
    validations, whole_validations = [], Validations()
    _, whole = run(stage, digits, tmp_path / "whole", whole_validations)
    assert sorted(whole) == list(range(1, NUM_BATCHES + 1))
    assert [batch for batch, _ in whole_validations.seen] == [3, 6, NUM_BATCHES]
    for callbacks in ([Interrupt(kills[0])], [Interrupt(kills[1])], []):
        seen = Validations()
        _, part = run(stage, digits, tmp_path / "parts", *callbacks, seen)
        assert part == {batch: whole[batch] for batch in part}
        validations += seen.seen
    assert NUM_BATCHES in part
    assert sorted(set(validations)) == whole_validations.seen
    assert_equal(weights(tmp_path / "parts", stage), weights(tmp_path / "whole", stage))


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_a_finished_stage_is_not_trained_again(stage, digits, tmp_path):
    run(stage, digits, tmp_path)
    before = (tmp_path / stage / "last.ckpt").read_bytes()
    _, losses = run(stage, digits, tmp_path)
    assert losses == {}
    assert (tmp_path / stage / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(stage, digits, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(stage, digits, tmp_path / name, seed=seed)
    assert_equal(weights(tmp_path / "a", stage), weights(tmp_path / "b", stage))
    with pytest.raises(AssertionError):
        assert_equal(weights(tmp_path / "a", stage), weights(tmp_path / "c", stage))


def test_the_transformers_checkpoint_is_a_complete_generator(digits, tmp_path):
    module, _ = run("var", digits, tmp_path)
    networks = load_networks(tmp_path)
    assert networks.info["tokenizer_fingerprint"] == networks.tokenizer.fingerprint()
    assert networks.info["patch_nums"] == PATCH_NUMS
    assert networks.info["class_names"] == [str(d) for d in range(10)]
    images = torch.stack([digits.val_transform(digits.val[i][0]) for i in range(4)])
    indices = networks.tokenizer.encode(images)
    inputs = networks.tokenizer.quantizer.teacher_forcing_input(indices)
    labels = torch.tensor([digits.val[i][1] for i in range(4)])
    assert torch.equal(networks.transformer(inputs, labels), module.transformer(inputs, labels))


def test_stage_two_leaves_the_tokenizer_as_it_was(digits, tmp_path):
    before = make_module("var").tokenizer.fingerprint()
    module, _ = run("var", digits, tmp_path)
    assert module.tokenizer.fingerprint() == before


def test_a_checkpoint_of_another_tokenizer_is_refused(digits, tmp_path):
    run("var", digits, tmp_path, Interrupt(5))
    content = read_checkpoint(tmp_path / "var" / "last.ckpt")
    content[KEY]["tokenizer_fingerprint"] = "0" * 16
    torch.save(content, tmp_path / "var" / "last.ckpt")
    with pytest.raises(ValueError, match="tokenizer_fingerprint 0000000000000000"):
        run("var", digits, tmp_path)


def test_validation_never_drops_labels(digits, tmp_path):
    module = make_module("var")
    module.label_drop = 1.0
    seen = []
    module.evaluated.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    batch = next(iter(ImageDataModule(digits).val_dataloader()))
    module.log_dict = lambda values, **_: None
    module.validation_step(batch, 0)
    assert torch.equal(seen[0], batch.labels)
    assert (module.drop_labels(batch.labels) == 10).all()


def test_usage_is_counted_against_what_a_scale_could_have_used():
    counts = torch.tensor([3, 0, 1, 0, 0, 0, 0, 0])  # 4 tokens could show 4 of 8 codes
    assert usage(counts).item() == 0.5
    assert usage(torch.ones(8)).item() == 1.0
    assert perplexity(torch.ones(8)).item() == pytest.approx(8)
    assert perplexity(torch.tensor([5, 0, 0])).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["batch_size", "num_batches", "seed"])
def test_a_run_continues_under_its_own_plan_only(name, digits, tmp_path):
    run("var", digits, tmp_path, Interrupt(5))
    plan = {"batch_size": 6, "num_batches": NUM_BATCHES, "seed": 0}
    plan[name] *= 2
    plan["seed"] += name == "seed"
    with pytest.raises(ValueError, match=f"started with {name}"):
        fit_stage(
            make_module("var"),
            ImageDataModule(digits),
            None,
            run_dir=tmp_path,
            val_every=3,
            **plan,
        )


def test_the_seconds_of_an_interrupted_run_add_up(digits, tmp_path):
    run("var", digits, tmp_path, Interrupt(5))
    first = progress_in(read_checkpoint(tmp_path / "var" / "last.ckpt"))["seconds"]
    run("var", digits, tmp_path)
    assert progress_in(read_checkpoint(tmp_path / "var" / "last.ckpt"))["seconds"] > first > 0


@pytest.mark.parametrize("name", ["batch_size", "num_batches", "val_every"])
def test_lengths_below_one_are_refused(name, digits, tmp_path):
    lengths = {"batch_size": 6, "num_batches": 2, "val_every": 1} | {name: 0}
    with pytest.raises(ValueError, match=name):
        fit_stage(
            make_module("var"), ImageDataModule(digits), None, run_dir=tmp_path, seed=0, **lengths
        )
    assert not list(tmp_path.iterdir())
