"""Pictures of figures: what they remember goes on exactly; a disk that is full ends no training."""

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import NUM_BATCHES, Interrupt, run
from test_saving import interrupted
from var_exp.evaluation.curves import heat_maps
from var_exp.training import callbacks
from var_exp.training.callbacks import CodebookMap, Curves, Report

PANELS = {"share of codes in use": "val/usage_scale_*"}


def map_of(folder):
    return np.asarray(Image.open(folder / "tokenizer" / "codebook.png"))


def test_the_map_of_codes_has_a_cell_for_each_scale_and_validation():
    history = {f"val/usage_scale_{k}x{k}": [(10, k / 4), (20, k / 4)] for k in (1, 2, 4)}
    one = heat_maps(history, PANELS)
    assert one.dtype == np.uint8 and one.shape[2] == 3
    history["val/usage_scale_4x4"][1] = (20, 0.5)  # within the range of the colours
    other = heat_maps(history, PANELS)
    rows, columns = np.nonzero((one != other).any(axis=2))
    # The lower right cell alone: the last third of the rows, the second half of the columns.
    height, width = one.shape[:2]
    assert rows.min() > height / 2 and columns.min() > width / 3


def test_scales_without_a_figure_in_some_validation_leave_an_empty_cell():
    history = {"val/usage_scale_1x1": [(10, 0.5), (20, 0.5)], "val/usage_scale_2x2": [(20, 0.1)]}
    assert heat_maps(history, PANELS).std() > 0


@pytest.mark.parametrize("stop", ["between validations", "in a validation"])
def test_the_map_of_an_interrupted_stage_is_that_of_the_whole_one(stop, digits, tmp_path):
    run("tokenizer", digits, tmp_path / "whole", CodebookMap(PANELS))
    parts = tmp_path / "parts"
    if stop == "between validations":
        run("tokenizer", digits, parts, CodebookMap(PANELS), Interrupt(5))
    else:
        asked = (6, True)
        interrupted("tokenizer", digits, parts, *asked, callbacks=[CodebookMap(PANELS)])
    run("tokenizer", digits, parts, CodebookMap(PANELS))
    assert np.array_equal(map_of(parts), map_of(tmp_path / "whole"))


def test_a_figure_of_a_validation_that_is_made_up_for_stands_once(digits, tmp_path):
    first, second = Curves({"PSNR": ["val/psnr"]}), Curves({"PSNR": ["val/psnr"]})
    interrupted("tokenizer", digits, tmp_path, 6, True, callbacks=[first])
    run("tokenizer", digits, tmp_path, second)
    assert [batch for batch, _ in second.history["val/psnr"]] == [3, 6, NUM_BATCHES]


def test_a_full_disk_is_told_once_for_each_kind_of_file_and_training_goes_on(
    digits, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(callbacks, "save_png", full)
    monkeypatch.setattr(callbacks, "write_report", full)
    shown = (Curves({"PSNR": ["val/psnr"]}), CodebookMap(PANELS), Report())
    _, losses = run("tokenizer", digits, tmp_path, *shown)
    assert len(losses) == NUM_BATCHES
    said = capsys.readouterr().err
    assert said.count("report.html failed") == 1
    assert said.count("No space left on device") == len(shown)
    assert not Path(tmp_path, "tokenizer", "curves.png").exists()
