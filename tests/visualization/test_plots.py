"""Curves: each panel is drawn, the expected band behind it, and a resumed run continues them."""

import numpy as np

from helpers.stages import Interrupt, run
from var_exp.training.callbacks.plots import Curves
from var_exp.visualization.panels import PANELS, matching, non_empty
from var_exp.visualization.plots import curves

HISTORY = {
    "val/loss": [(10, 3.0), (20, 2.0)],
    "val/loss_scale_1": [(10, 2.5), (20, 1.5)],
    "val/acc": [(10, 0.1), (20, 0.2)],
}


def shows(picture, colour, tolerance=12):
    """Number of pixels of about that colour."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) < tolerance).sum())


def test_a_panel_shows_scales_from_coarse_to_fine_and_no_limits_of_bands():
    loss = PANELS[0]
    names = [f"val/loss_scale_{side}" for side in ("16", "2x3", "4", "1")]
    names += ["val/loss", "val/loss_last_scale", "val/loss_expected_low", "train/loss"]
    scales = [f"val/loss_scale_{side}" for side in ("1", "2x3", "4", "16")]
    assert matching(names, loss) == ["val/loss", *scales]


def test_no_metric_stands_in_two_panels():
    names = {p.replace("*", x) for panel in PANELS for p in panel.patterns for x in ("4", "b_4")}
    shown = [name for panel in PANELS for name in matching(names, panel)]
    assert sorted(shown) == sorted(set(shown)) != []


def test_there_is_a_plot_for_each_panel_in_which_something_was_logged():
    one = curves({"val/loss": HISTORY["val/loss"]}, {})
    two = curves(HISTORY | {"val/unheard_of": [(10, 1.0)], "val/ssim": [(10, 0.9)]}, {})
    assert one.dtype == np.uint8 and one.shape[2] == 3
    assert two.shape[1] == 2 * one.shape[1]
    assert [panel.title for panel, _ in non_empty(HISTORY)] == [p.title for p in PANELS[:2]]


def test_the_band_is_drawn_behind_the_metric_it_belongs_to():
    band = (249, 235, 206)  # the band's gold at 30 % on white
    without = curves(HISTORY, {})
    loss = curves(HISTORY, {"val/loss": [1.8, 2.2]})
    accuracy = curves(HISTORY, {"val/acc": [0.15, 0.19]})
    unknown = curves(HISTORY, {"val/fid": [3, 4]})
    half = loss.shape[1] // 2
    assert shows(without, band) == shows(unknown, band) == 0
    assert shows(loss[:, :half], band) > 2000 and shows(loss[:, half:], band) == 0
    assert shows(accuracy[:, half:], band) > 2000 and shows(accuracy[:, :half], band) == 0


def test_a_run_that_was_interrupted_keeps_its_curve(digits, tmp_path):
    def watched():
        return Curves({"var/loss": [2.0, 2.5], "tokenizer/psnr": [9, 10]})

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
