"""Looking at how fast a stage trains changes nothing; in a simulated time its figures are right;
they and the figures of training reach every logger."""

import csv
import functools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import SimpleProfiler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.operations import counted, step_of_transformer
from helpers.stages import NUM_BATCHES, Interrupt, assert_equal, make_module, run, weights
from var_exp.data import ImageSource
from var_exp.tokenizer.adversarial_loss import AdversarialLoss
from var_exp.tokenizer.discriminator import PatchGAN
from var_exp.training.callbacks import throughput as monitor
from var_exp.training.callbacks.throughput import ThroughputMonitor
from var_exp.training.loggers.csv import ContinuedCSVLogger
from var_exp.training.loggers.tensorboard import ImageTensorBoardLogger
from var_exp.training.loggers.wandb import ContinuedWandbLogger
from var_exp.training.progressive import ProgressiveScales

PEAK = 1e9
SPEED = {"images_per_second", "data_wait", "memory_gb", "tflops", "share_of_peak", "hours_left"}
ALL = [
    functools.partial(ContinuedCSVLogger, name="csv"),
    functools.partial(ImageTensorBoardLogger, name="tensorboard"),
    functools.partial(ContinuedWandbLogger, project="test", mode="offline"),
]


class Rows(Logger):
    """Keeps what it is told, by step."""

    name = version = experiment = "rows"

    def __init__(self, rows, save_dir, version):
        super().__init__()
        self.rows = rows

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_):
        pass


def run_with_rows(stage, source, folder, *callbacks, every=1, trainer=(), **changes):
    """Fit a module; what a logger was told, by step."""
    rows = {}
    loggers = [functools.partial(Rows, rows)]
    trainer = {"log_every_n_steps": every} | dict(trainer)
    run(stage, source, folder, *callbacks, loggers=loggers, trainer=trainer, **changes)
    return rows


def speed(row):
    return {k.removeprefix("speed/"): v for k, v in row.items() if k.startswith("speed/")}


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    peaks = {torch.float32: PEAK, torch.bfloat16: 16 * PEAK}
    monkeypatch.setattr(monitor, "peak_flops", lambda device, dtype: peaks[dtype])


# -- nothing changes ------------------------------------------------------------------------


def changes_of(stage):
    """Batches whose amount of work changes, so that operations are counted again."""
    if stage == "var":
        return {"progressive": ProgressiveScales(first=1)}
    torch.manual_seed(1)
    return {
        "adversary": AdversarialLoss(PatchGAN(width=8, num_layers=2), start=2, ramp=2, weight=0.5)
    }


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_a_run_that_is_looked_at_is_the_run_that_is_not_to_the_bit(stage, digits, tmp_path):
    options = {"loggers": ALL, "trainer": {"log_every_n_steps": 1}}
    _, losses = run(stage, digits, tmp_path / "alone", **changes_of(stage))
    _, watched = run(stage, digits, tmp_path / "watched", **options, **changes_of(stage))
    assert watched == losses and len(losses) == NUM_BATCHES
    options["loggers"] = ALL[:2]
    run(stage, digits, tmp_path / "resumed", Interrupt(5), **options, **changes_of(stage))
    _, resumed = run(stage, digits, tmp_path / "resumed", **options, **changes_of(stage))
    assert NUM_BATCHES in resumed and resumed == {batch: losses[batch] for batch in resumed}
    for name in ("watched", "resumed"):
        assert_equal(weights(tmp_path / name, stage), weights(tmp_path / "alone", stage))


# -- a simulated time -----------------------------------------------------------------------


class Clock:
    """Stands still unless it is told how long something takes."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


class Takes(Callback):
    """How many seconds a batch takes, `more` for each before it, and a validation."""

    def __init__(self, clock, batch, validation=0.0, more=0.0):
        self.clock, self.batch, self.validation, self.more = clock, batch, validation, more

    def on_train_batch_start(self, trainer, module, batch, i):
        self.clock.now += self.batch + self.more * module.batch

    def on_validation_start(self, trainer, module):
        self.clock.now += self.validation


class Slow(ImageSource):
    """The digits, each of which takes a while to load."""

    def __init__(self, digits, clock, seconds):
        super().__init__("slow", 16, 1, digits.class_names)
        self.digits, self.clock, self.seconds = digits, clock, seconds
        self.setup()

    def load(self):
        return self.digits.train, self.digits.val

    def train_transform(self, image, rng):
        self.clock.now += self.seconds
        return super().train_transform(image, rng)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


@pytest.mark.parametrize(
    "image, batch, share", [(9.0, 1.0, 54 / 55), (0.0, 1.0, 0.0), (0.5, 1, 0.75)]
)
def test_waiting_for_data_is_the_share_of_time_before_a_batch_is_there(
    image, batch, share, digits, clock, tmp_path
):
    source = Slow(digits, clock, image)
    rows = run_with_rows("var", source, tmp_path, Takes(clock, batch, validation=100.0))
    found = [speed(rows[step]) for step in range(1, NUM_BATCHES)]
    assert [row["data_wait"] for row in found] == pytest.approx([share] * len(found))
    rate = 6 / (6 * image + batch)  # six images a batch; validations are no part of it
    assert [row["images_per_second"] for row in found] == pytest.approx([rate] * len(found))


def test_the_time_left_counts_down_to_nothing_and_validations_count_in_it(digits, clock, tmp_path):
    rows = run_with_rows("var", digits, tmp_path, Takes(clock, 60.0, validation=300.0), val_every=4)
    left = {step: 60 * speed(row)["hours_left"] for step, row in rows.items() if step > 0}
    # Minutes: one a batch until a validation has been seen, which then is part of the mean batch.
    assert [left[step] for step in (1, 2, 3)] == pytest.approx([6, 5, 4])
    assert [left[step] for step in (4, 5, 6, 7)] == pytest.approx(
        [9 / 4 * 3, 10 / 5 * 2, 11 / 6, 0]
    )


def test_an_interruption_does_not_bend_the_time_left(digits, clock, tmp_path):
    takes = Takes(clock, 60.0)
    run_with_rows("var", digits, tmp_path, takes, Interrupt(5), val_every=2)
    clock.now += 1e6
    rows = run_with_rows("var", digits, tmp_path, takes, val_every=2)
    begun = min(rows)
    assert begun > 0 and speed(rows[begun])  # whose operations are known from before
    for step in range(begun + 1, NUM_BATCHES):
        assert 60 * speed(rows[step])["hours_left"] == pytest.approx(NUM_BATCHES - 1 - step)


def test_the_first_batch_whose_operations_are_counted_is_no_part_of_the_figures(
    digits, clock, tmp_path
):
    rows = run_with_rows("var", digits, tmp_path, Takes(clock, 1.0))
    assert not speed(rows[0]) and all(speed(rows[step]) for step in range(1, NUM_BATCHES))


class Watched(Callback):
    """The trainer, and the operations that the monitor has counted."""

    def on_train_batch_end(self, trainer, module, *_):
        self.trainer = trainer
        (found,) = [c for c in trainer.callbacks if isinstance(c, ThroughputMonitor)]
        self.flops = found.flops


def test_operations_a_second_are_those_of_a_step_of_networks_of_this_size(digits, clock, tmp_path):
    watched, options = Watched(), {"dropout": 0.0, "quantizer_dropout": 0.0}
    rows = run_with_rows("var", digits, tmp_path, Takes(clock, 2.0), watched, **options)
    module = make_module("var", **options)
    reading = counted(lambda: module.read(torch.zeros(6, 1, 16, 16)))
    operations = reading + step_of_transformer(module.transformer, 6)
    assert reading > 0 and watched.flops == {"3 scales": operations}
    for step in range(1, NUM_BATCHES):
        assert speed(rows[step])["tflops"] == pytest.approx(operations / 2 / 1e12)
        assert speed(rows[step])["share_of_peak"] == pytest.approx(operations / 2 / PEAK)


def test_batches_of_more_work_are_counted_anew(digits, clock, tmp_path):
    watched = Watched()
    rows = run_with_rows(
        "var", digits, tmp_path, Takes(clock, 2.0), watched, progressive=ProgressiveScales(first=1)
    )
    one, two, three = (watched.flops[f"{n} scales"] for n in (1, 2, 3))
    assert one < two < three
    assert speed(rows[NUM_BATCHES - 1])["tflops"] == pytest.approx(three / 2 / 1e12)


def test_the_figures_of_an_interval_are_those_of_its_batches_alone(digits, clock, tmp_path):
    rows = run_with_rows("var", digits, tmp_path, Takes(clock, 1.0, more=1.0), every=4)
    assert sorted(step for step, row in rows.items() if speed(row)) == [3, 7]
    assert speed(rows[3])["images_per_second"] == pytest.approx(18 / (2 + 3 + 4))
    assert speed(rows[7])["images_per_second"] == pytest.approx(24 / (5 + 6 + 7 + 8))


def test_the_share_is_of_the_peak_in_the_precision_of_training(digits, clock, tmp_path):
    takes, trainer = Takes(clock, 2.0), {"precision": "bf16-mixed"}
    row = speed(run_with_rows("var", digits, tmp_path, takes, trainer=trainer)[NUM_BATCHES - 1])
    assert row["share_of_peak"] == pytest.approx(row["tflops"] * 1e12 / (16 * PEAK))


# -- loggers --------------------------------------------------------------------------------


class Figures(Callback):
    """What the module had to say of each batch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[module.batch] = {k: float(v) for k, v in module.figures.items()}


def training(row):
    return {k: v for k, v in row.items() if k.startswith("train/")}


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_the_figures_of_every_nth_batch_are_logged_as_they_are(stage, digits, tmp_path):
    figures = Figures()
    rows = run_with_rows(stage, digits, tmp_path, figures, every=2, **changes_of(stage))
    logged = {step: training(row) for step, row in rows.items() if training(row)}
    assert logged == {step: figures.seen[step] for step in (1, 3, 5, 7)}
    expected = {"train/loss", "train/lr", "train/weight_decay", "train/grad_norm"}
    assert all(expected <= row.keys() for row in logged.values())


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_a_continued_run_logs_the_rows_of_the_one_that_was_not_interrupted(stage, digits, tmp_path):
    whole = run_with_rows(stage, digits, tmp_path / "whole", every=2)
    first = run_with_rows(stage, digits, tmp_path / "parts", Interrupt(5), every=2)
    rest = run_with_rows(stage, digits, tmp_path / "parts", every=2)
    assert {s: training(r) for s, r in (first | rest).items()} == {
        s: training(r) for s, r in whole.items()
    }


def test_an_interval_of_zero_logs_validations_only(digits, tmp_path):
    rows = run_with_rows("var", digits, tmp_path, every=0)
    assert sorted(rows) == [2, 5, 7]
    assert not any(name.startswith(("train/", "speed/")) for row in rows.values() for name in row)


class Written(Callback):
    """The last row of a file after each batch: of a run that is killed nothing is missing."""

    def __init__(self, path):
        self.path, self.rows = path, {}

    def on_train_batch_end(self, trainer, module, *_):
        with open(self.path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) == module.batch]
        self.rows[module.batch] = rows[0]


@pytest.mark.parametrize("stage", ["tokenizer", "var"])
def test_every_logger_gets_the_speed_and_the_figures_of_training(stage, digits, tmp_path):
    now = Written(tmp_path / "csv" / stage / "metrics.csv")
    run(stage, digits, tmp_path, now, loggers=ALL, trainer={"log_every_n_steps": 1})
    assert all(row["train/loss"] for row in now.rows.values())
    expected = {f"speed/{name}" for name in SPEED} | {"train/loss", "train/lr", "train/grad_norm"}
    with open(tmp_path / "csv" / stage / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(any(row[name] for row in rows) for name in expected)
    board = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
    assert expected <= set(board.Tags()["scalars"])
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = written.read_bytes()
    assert all(name.encode() in content for name in expected)


# -- it leaves nothing behind ---------------------------------------------------------------


@pytest.mark.parametrize("kill", [None, 0, 5], ids=["finished", "at once", "interrupted"])
def test_a_profiler_of_the_users_sees_what_it_would_and_is_given_back(kill, digits, tmp_path):
    profiler, watched = SimpleProfiler(), Watched()
    callbacks = [watched] if kill is None else [watched, Interrupt(kill)]
    run("var", digits, tmp_path, *callbacks, loggers=ALL[:1], trainer={"profiler": profiler})
    fetched = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    assert len(fetched) >= (NUM_BATCHES if kill is None else kill)
    if kill != 0:
        assert watched.trainer.profiler is profiler
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
