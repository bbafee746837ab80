"""Looking at a model in training ends when it is asked to, and goes on exactly.

A disk that is full ends no training.
"""

import csv
import errno
import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.programs import csv_rows
from helpers.sample_sets import Means
from helpers.stages import NUM_BATCHES, Interrupt, run
from helpers.together import together
from tests.distributed.test_launch import TWO
from tests.training.test_checkpointing import interrupted
from var_exp.distributed.collectives import rank
from var_exp.distributed.signals import Interrupted, SignalHandler
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.metrics import ScoreSettings
from var_exp.training.callbacks import plots
from var_exp.training.callbacks.evaluation import EvaluationCallback, SamplePictures, SampleScores
from var_exp.training.callbacks.plots import CodebookMap, Curves, Report
from var_exp.training.loggers.csv import ContinuedCSVLogger
from var_exp.visualization.plots import heat_maps


def map_of(folder):
    return np.asarray(Image.open(folder / "tokenizer" / "codebook.png"))


def test_the_map_of_codes_has_a_cell_for_each_scale_and_validation():
    history = {f"val/usage_scale_{k}x{k}": [(10, k / 4), (20, k / 4)] for k in (1, 2, 4)}
    one = heat_maps(history)
    assert one.dtype == np.uint8 and one.shape[2] == 3
    history["val/usage_scale_4x4"][1] = (20, 0.5)  # within the range of the colours
    other = heat_maps(history)
    rows, columns = np.nonzero((one != other).any(axis=2))
    # The lower right cell alone: the last third of the rows, the second half of the columns.
    height, width = one.shape[:2]
    assert rows.min() > height / 2 and columns.min() > width / 3


def test_scales_without_a_figure_in_some_validation_leave_an_empty_cell():
    first = [(10, 0.5), (20, 0.1)]
    full, gap = (
        heat_maps({"val/usage_scale_1x1": first, "val/usage_scale_2x2": second})
        for second in ([(10, 0.5), (20, 0.1)], [(20, 0.1)])
    )
    changed = (full != gap).any(axis=2)
    rows, columns = np.nonzero(changed)
    # The lower left cell alone, and there is paper in it.
    height, width = changed.shape
    assert rows.min() > height / 3 and columns.max() < width * 2 / 3
    assert (gap[rows.mean().astype(int), columns.mean().astype(int)] == 255).all()


@pytest.mark.parametrize("stop", ["between validations", "in a validation"])
def test_the_map_of_an_interrupted_stage_is_that_of_the_whole_one(stop, digits, tmp_path):
    run("tokenizer", digits, tmp_path / "whole", CodebookMap())
    parts = tmp_path / "parts"
    if stop == "between validations":
        run("tokenizer", digits, parts, CodebookMap(), Interrupt(5))
    else:
        asked = (6, True)
        interrupted("tokenizer", digits, parts, *asked, callbacks=[CodebookMap()])
    run("tokenizer", digits, parts, CodebookMap())
    assert np.array_equal(map_of(parts), map_of(tmp_path / "whole"))


def test_a_figure_of_a_validation_that_is_made_up_for_stands_once(digits, tmp_path):
    first, second = Curves(), Curves()
    interrupted("tokenizer", digits, tmp_path, 6, True, callbacks=[first])
    run("tokenizer", digits, tmp_path, second)
    assert [batch for batch, _ in second.history["val/psnr"]] == [3, 6, NUM_BATCHES]


# -- evaluations in training ----------------------------------------------------------------


class Watched(Evaluator):
    """Has a stage asked to stop in the n-th batch that is read or drawn, of one process."""

    def __init__(self, source, stop_at, stopped_rank=0):
        settings = {"cfg_scale": 1.0}
        super().__init__(source, Means(), settings, batch_size=8, num_reference=40)
        self.score_settings = ScoreSettings(num_neighbours=1)
        self.stop_at, self.stopped_rank = stop_at, stopped_rank
        self.signal_handler, self.num_batches, self.asked_after = SignalHandler(), 0, None
        self.network.register_forward_hook(lambda *_: self.count())

    def count(self):
        self.num_batches += 1
        if self.num_batches == self.stop_at and rank() == self.stopped_rank:
            self.signal_handler.received = 15


LOGGED = {
    "loggers": [functools.partial(ContinuedCSVLogger, name="csv")],
    "trainer": {"log_every_n_steps": 1},
}


def looked_at(source, folder, stop_at=None, every=2, trainer=None, stopped_rank=0):
    """Run a stage that is scored; whether it was stopped, and after how many batches of images."""
    evaluator = Watched(source, stop_at, stopped_rank)
    every = {"every_n_batches": every}
    shown = (SamplePictures(evaluator, 1, **every), SampleScores(evaluator, 24, **every))
    options = LOGGED | {"signals": evaluator.signal_handler}
    options["trainer"] = LOGGED["trainer"] | (trainer or {})
    try:
        run("var", source, folder, *shown, **options)
    except Interrupted:
        return True, evaluator.num_batches
    return False, evaluator.num_batches


def rows_of(folder):
    """The rows of scores in the log, those that stand twice too, in a form that is compared."""
    with open(folder / "csv" / "var" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/fid_means"]]
    return sorted(tuple(sorted((k, v) for k, v in row.items() if v)) for row in rows)


@pytest.fixture(scope="module", params=[2, 3, None], ids="every {}".format)
def scored(request, digits, tmp_path_factory):
    """An uninterrupted stage that is scored at every so many batches: these, and its folder."""
    folder = tmp_path_factory.mktemp("scored")
    assert not looked_at(digits, folder, every=request.param)[0]
    return request.param, folder


# The references take 5 and 45 batches, the samples of each of two networks 3.
@pytest.mark.parametrize("stop_at", [3, 50, 53, 55, 60])
def test_an_evaluation_ends_within_a_batch_and_is_made_up_for(stop_at, scored, digits, tmp_path):
    every, whole = scored
    assert looked_at(digits, tmp_path, stop_at, every) == (True, stop_at)
    assert looked_at(digits, tmp_path, every=every)[0] is False
    assert csv_rows(tmp_path, "var") == csv_rows(whole, "var")
    assert rows_of(tmp_path) == rows_of(whole)


def test_two_processes_end_an_evaluation_together_and_go_on_exactly(digits, tmp_path):
    both = functools.partial(together, 2)
    both(tmp_path / "1", looked_at, digits, tmp_path / "whole", None, 2, TWO)
    stopped = both(tmp_path / "2", looked_at, digits, tmp_path / "parts", 12, 2, TWO, 1)
    assert [was_stopped for was_stopped, _ in stopped] == [True, True]
    assert max(count for _, count in stopped) <= 13
    done = both(tmp_path / "3", looked_at, digits, tmp_path / "parts", None, 2, TWO)
    assert [was_stopped for was_stopped, _ in done] == [False, False]
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_two_of_a_kind_may_look_at_different_batches(digits, tmp_path):
    seen = []

    class Look(EvaluationCallback):
        def evaluate(self, trainer, module):
            seen.append((self.every_n_batches, module.batch + 1))

    run("var", digits, tmp_path, *(Look(Watched(digits, None), every_n_batches=n) for n in (3, 4)))
    assert seen == [(3, 3), (4, 4), (3, 6), (4, 8)]


# -- a full disk ----------------------------------------------------------------------------


def test_a_full_disk_is_told_once_for_each_kind_of_file_and_training_goes_on(
    digits, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plots, "save_png", full)
    monkeypatch.setattr(plots, "write_report", full)
    shown = (Curves(), CodebookMap(), Report())
    _, losses = run("tokenizer", digits, tmp_path, *shown)
    assert len(losses) == NUM_BATCHES
    said = capsys.readouterr().err
    assert said.count("report.html failed") == 1
    assert said.count("No space left on device") == len(shown)
    assert not Path(tmp_path, "tokenizer", "curves.png").exists()
