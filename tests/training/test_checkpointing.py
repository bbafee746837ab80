"""Whenever a stage is stopped it goes on as if it had not been; damaged files are passed over."""

import errno
import functools
import os

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers.programs import csv_rows
from helpers.stages import NUM_BATCHES, Validations, assert_equal, progress, run, weights
from var_exp.checkpoint.checkpoint import read_checkpoint
from var_exp.distributed.signals import Interrupted, SignalHandler
from var_exp.io.files import verify_checksum
from var_exp.training.callbacks import checkpointing as saving
from var_exp.training.loggers.csv import ContinuedCSVLogger
from var_exp.training.resume import BEST, LAST, PREVIOUS, newest, progress_in


class Ask(Callback):
    """Have a stage asked to stop while it trains on a batch, or in a validation after it."""

    def __init__(self, batch, in_validation=False):
        self.batch, self.in_validation = batch, in_validation
        self.signal_handler = SignalHandler()

    def on_train_batch_start(self, trainer, module, batch, i):
        if not self.in_validation and progress(trainer) + 1 == self.batch:
            self.signal_handler.received = 15

    def on_validation_batch_start(self, trainer, module, batch, i, *_):
        if self.in_validation and progress(trainer) == self.batch and i == 1:
            self.signal_handler.received = 15


def interrupted(stage, source, folder, *asked, callbacks=(), **options):
    """Run a stage until it was asked to stop; what it was validated at."""
    seen, ask = Validations(), Ask(*asked)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(stage, source, folder, *callbacks, ask, seen, signals=ask.signal_handler, **options)
    return seen.seen


@pytest.fixture(scope="module", params=["tokenizer", "var"])
def whole(request, digits, tmp_path_factory):
    """An uninterrupted stage: its name, folder, losses by batch and validations."""
    folder, seen = tmp_path_factory.mktemp("whole"), Validations()
    _, losses = run(request.param, digits, folder, seen)
    return request.param, folder, losses, seen.seen


def assert_like(whole, folder, validations):
    """A stage that was stopped and went on is the whole one."""
    stage, whole_folder, _, whole_validations = whole
    assert validations == whole_validations
    assert_equal(weights(folder, stage), weights(whole_folder, stage))
    ours, theirs = (read_checkpoint(f / stage / BEST) for f in (folder, whole_folder))
    assert progress_in(ours)["batch"] == progress_in(theirs)["batch"]
    assert_equal(ours["state_dict"], theirs["state_dict"])


@pytest.mark.parametrize("batch", range(1, NUM_BATCHES + 1))
def test_a_stage_asked_to_stop_at_any_batch_goes_on_exactly(batch, whole, digits, tmp_path):
    stage, _, losses, _ = whole
    validations = interrupted(stage, digits, tmp_path, batch)
    assert progress_in(read_checkpoint(tmp_path / stage / LAST))["batch"] == batch
    seen = Validations()
    _, later = run(stage, digits, tmp_path, seen)
    assert later == {b: losses[b] for b in range(batch + 1, NUM_BATCHES + 1)}
    assert_like(whole, tmp_path, validations + seen.seen)


@pytest.mark.parametrize("batch", [3, 6, NUM_BATCHES])
def test_a_validation_that_was_cut_off_is_made_up_for(batch, whole, digits, tmp_path):
    stage = whole[0]
    validations = interrupted(stage, digits, tmp_path, batch, True)
    validations += interrupted(stage, digits, tmp_path, batch, True)  # once more
    seen = Validations()
    run(stage, digits, tmp_path, seen)
    assert_like(whole, tmp_path, validations + seen.seen)


@pytest.mark.parametrize("asked", [(3, True), (5,), (NUM_BATCHES,), (NUM_BATCHES, True)], ids=str)
def test_the_log_of_a_stage_that_went_on_is_that_of_the_whole_one(asked, digits, tmp_path):
    log = [functools.partial(ContinuedCSVLogger, name="csv")]
    options = {"loggers": log, "trainer": {"log_every_n_steps": 1}}
    run("var", digits, tmp_path / "whole", **options)
    interrupted("var", digits, tmp_path / "parts", *asked, **options)
    run("var", digits, tmp_path / "parts", **options)
    whole = csv_rows(tmp_path / "whole", "var")
    assert (NUM_BATCHES - 1, "val/loss") in whole and (0, "train/loss") in whole
    assert csv_rows(tmp_path / "parts", "var") == whole


def test_stopped_after_every_batch_it_goes_on_exactly(whole, digits, tmp_path):
    stage, validations = whole[0], []
    for batch in range(1, NUM_BATCHES + 1):
        validations += interrupted(stage, digits, tmp_path, batch)
    seen = Validations()
    run(stage, digits, tmp_path, seen)
    assert_like(whole, tmp_path, validations + seen.seen)


def test_checkpoints_between_validations_are_kept_where_asked_for(digits, tmp_path):
    kept = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            found = newest(tmp_path / "var")
            kept.append((progress(trainer), found and progress_in(found.content)["batch"]))

    run("var", digits, tmp_path, Look(), save_every=2)
    assert kept == [(0, None), (1, None), (2, 2), (3, 3), (4, 4), (5, 4), (6, 6), (7, 6)]


# -- damaged files --------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


damages = pytest.mark.parametrize("damage", [truncate, empty, flip], ids=lambda f: f.__name__)


@damages
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage, whole, digits, tmp_path, capsys
):
    stage, _, losses, _ = whole
    interrupted(stage, digits, tmp_path, 7)  # last.ckpt is of batch 7, previous.ckpt of batch 6
    damage(tmp_path / stage / LAST)
    _, later = run(stage, digits, tmp_path)
    assert later == {b: losses[b] for b in (7, 8)}
    said = capsys.readouterr().err
    assert repr(str(tmp_path / stage / LAST)) in said and "damaged" in said
    assert f"going on from {str(tmp_path / stage / PREVIOUS)!r}" in said
    assert_equal(weights(tmp_path, stage), weights(whole[1], stage))


def test_where_all_checkpoints_are_damaged_the_stage_refuses_to_begin_again(digits, tmp_path):
    interrupted("var", digits, tmp_path, 7)
    truncate(tmp_path / "var" / LAST)
    flip(tmp_path / "var" / PREVIOUS)
    with pytest.raises(ValueError, match=r"last.ckpt.*previous.ckpt.*resume=never starts over"):
        run("var", digits, tmp_path)


@damages
def test_a_damaged_best_checkpoint_is_named_and_another_one_takes_its_place(
    damage, whole, digits, tmp_path, capsys
):
    stage = whole[0]
    interrupted(stage, digits, tmp_path, 6, True)
    best = tmp_path / stage / BEST
    assert progress_in(read_checkpoint(best))["batch"] == 3
    damage(best)
    run(stage, digits, tmp_path)
    assert f"{str(best)!r}: damaged" in capsys.readouterr().err
    assert progress_in(read_checkpoint(best))["batch"] > 3


def test_a_finished_stage_with_a_damaged_best_checkpoint_hands_on_the_last(
    digits, tmp_path, capsys
):
    run("var", digits, tmp_path)
    flip(tmp_path / "var" / BEST)
    last = read_checkpoint(tmp_path / "var" / LAST)["state_dict"]
    module, _ = run("var", digits, tmp_path)
    prefix = "averaged_transformer."
    expected = {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}
    assert_equal(module.transformer.state_dict(), expected)


# -- a disk that is full --------------------------------------------------------------------


def test_a_full_disk_stops_saving_not_training(whole, digits, tmp_path, monkeypatch, capsys):
    stage, whole_folder, losses, _ = whole
    written, real = [], saving.write_checkpoint

    def full_for_a_while(content, path, keep=None):
        written.append(path.name)
        if 3 <= len(written) <= 4:  # those of the second validation
            raise OSError(errno.ENOSPC, "No space left on device")
        real(content, path, keep)

    monkeypatch.setattr(saving, "write_checkpoint", full_for_a_while)
    _, ours = run(stage, digits, tmp_path)
    assert ours == losses
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert_equal(weights(tmp_path, stage), weights(whole_folder, stage))
    for path in (tmp_path / stage).glob("*.ckpt"):
        verify_checksum(path)


def test_a_disk_that_stays_full_leaves_the_old_files_whole(digits, tmp_path, monkeypatch):
    interrupted("var", digits, tmp_path, 4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "var").glob("*.ckpt")}

    def full(content, path):
        path.write_bytes(b"the first half of a checkpoint")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    run("var", digits, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "var").iterdir()} == before


def test_an_interruption_says_whether_what_was_done_last_is_saved(digits, tmp_path, monkeypatch):
    def full(content, path, keep=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert stop(digits, tmp_path / "a").saved
    monkeypatch.setattr(saving, "write_checkpoint", full)
    assert not stop(digits, tmp_path / "b").saved


def stop(source, folder):
    """How a stage ends that is asked to stop at its second batch."""
    ask = Ask(2)
    with pytest.raises(Interrupted) as stopped:
        run("var", source, folder, ask, signals=ask.signal_handler)
    return stopped.value


# -- going on from elsewhere ----------------------------------------------------------------


def test_a_new_run_folder_begins_where_another_one_is(whole, digits, tmp_path):
    stage, _, losses, _ = whole
    interrupted(stage, digits, tmp_path / "a", 5)
    for path in (tmp_path / "a", tmp_path / "a" / stage, tmp_path / "a" / stage / LAST):
        folder = tmp_path / f"from_{path.name}"
        _, later = run(stage, digits, folder, resume=str(path))
        assert later == {b: losses[b] for b in (6, 7, 8)}
        assert_equal(weights(folder, stage), weights(whole[1], stage))
    _, later = run(stage, digits, folder, resume=str(path))  # as after a requeue
    assert later == {}


def test_going_back_in_the_same_run_folder_takes_the_named_file(whole, digits, tmp_path):
    stage, _, losses, _ = whole
    interrupted(stage, digits, tmp_path, 7)
    _, later = run(stage, digits, tmp_path, resume=str(tmp_path / stage / PREVIOUS))
    assert sorted(later) == [7, 8]


def test_a_folder_without_checkpoints_is_no_place_to_begin_from(digits, tmp_path):
    (tmp_path / "a" / "tokenizer").mkdir(parents=True)
    with pytest.raises(ValueError, match="resume: expected a checkpoint.*holds neither last.ckpt"):
        run("tokenizer", digits, tmp_path / "b", resume=str(tmp_path / "a"))


def test_begun_anew_nothing_is_left_of_the_training_before(digits, tmp_path):
    log = {"loggers": [functools.partial(ContinuedCSVLogger, name="csv")]}
    log["trainer"] = {"log_every_n_steps": 1}
    run("var", digits, tmp_path, **log)
    (tmp_path / "var" / "wandb_id").write_text("x")
    interrupted("var", digits, tmp_path, 2, resume="never", **log)
    assert [path.name for path in (tmp_path / "var").iterdir()] == [LAST]
    assert {step for step, _ in csv_rows(tmp_path, "var")} == {0, 1}
    _, later = run("var", digits, tmp_path, **log)
    assert sorted(later) == list(range(3, NUM_BATCHES + 1))


def test_there_is_nothing_to_go_on_from_at_a_path_that_does_not_exist(digits, tmp_path):
    with pytest.raises(ValueError, match="resume: expected auto, never, a checkpoint"):
        run("var", digits, tmp_path, resume="sometimes")
