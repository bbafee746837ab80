"""Curves: every figure is drawn, the expected band lies behind it, and a resumed run goes on."""

import numpy as np

from helpers.stages import Interrupt, run
from var_exp.training.callbacks.plots import Curves
from var_exp.visualization.plots import curves

HISTORY = {
    "val/loss": [(10, 3.0), (20, 2.0)],
    "val/loss_scale_1": [(10, 2.5), (20, 1.5)],
    "val/acc": [(10, 0.1), (20, 0.2)],
}
PANELS = {"loss": ["val/loss_scale_*", "val/loss"], "accuracy": ["val/acc"]}


def shows(picture, colour, tolerance=12):
    """Number of pixels of about that colour."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) < tolerance).sum())


def test_there_is_a_panel_for_each_group():
    one = curves(HISTORY, {"loss": PANELS["loss"]}, {})
    two = curves(HISTORY, PANELS, {})
    assert one.dtype == np.uint8 and one.shape[2] == 3
    assert two.shape[1] == 2 * one.shape[1]


def test_the_band_is_drawn_behind_the_figure_it_belongs_to():
    band = (249, 235, 206)  # the band's gold at 30 % on white
    without = curves(HISTORY, PANELS, {})
    loss = curves(HISTORY, PANELS, {"val/loss": [1.8, 2.2]})
    unknown = curves(HISTORY, PANELS, {"val/fid": [3, 4]})
    assert shows(without, band) == shows(unknown, band) == 0
    assert shows(loss, band) > 2000
    half = loss.shape[1] // 2
    assert shows(loss[:, half:], band) == 0


def test_a_run_that_was_interrupted_keeps_its_curve(digits, tmp_path):
    def watched():
        return Curves({"loss": ["val/loss"]}, {"var/loss": [2.0, 2.5], "tokenizer/psnr": [9, 10]})

    whole, first, second = watched(), watched(), watched()
    run("var", digits, tmp_path / "whole", whole)
    run("var", digits, tmp_path / "parts", first, Interrupt(5))
    run("var", digits, tmp_path / "parts", second)
    assert [batch for batch, _ in whole.history["val/loss"]] == [3, 6, 8]
    assert second.history == whole.history
    pictures = [
        (tmp_path / name / "var" / "curves.png").read_bytes() for name in ("whole", "parts")
    ]
    assert pictures[0] == pictures[1]
