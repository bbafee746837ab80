"""A stage that was interrupted and continued is the stage that never was; the same seed twice
gives the same weights; the checkpoint is a complete generator of plain data."""

import pytest
import torch

from helpers.stages import (
    NUM_BATCHES,
    PATCH_NUMS,
    Interrupt,
    Validations,
    assert_equal,
    make_module,
    run,
    weights,
)
from var_exp.checkpoint.checkpoint import KEY, load_networks, read_checkpoint, write_checkpoint
from var_exp.data import ImageDataModule
from var_exp.training.fit import StageSchedule, fit_stage
from var_exp.training.resume import progress_in
from var_exp.training.tokenizer_module import perplexity, usage


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
    write_checkpoint(content, tmp_path / "var" / "last.ckpt")
    with pytest.raises(ValueError, match="tokenizer_fingerprint 0000000000000000"):
        run("var", digits, tmp_path)


def test_validation_never_drops_labels(digits, tmp_path):
    module = make_module("var")
    module.class_dropout_prob = 1.0
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
            StageSchedule(val_every=3, **plan),
            run_dir=tmp_path,
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
        schedule = StageSchedule(seed=0, **lengths)
        fit_stage(make_module("var"), ImageDataModule(digits), None, schedule, run_dir=tmp_path)
    assert not list(tmp_path.iterdir())
