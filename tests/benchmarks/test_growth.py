"""How cost grows is fitted, written, drawn and told as it was measured."""

import json
import math

import pytest

from benchmarks import growth
from tests.benchmarks.test_benchmarks import TINY


def test_the_exponent_is_the_power_that_times_grow_with():
    sizes = [1, 2, 4, 8]
    assert growth.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


@pytest.mark.parametrize("side", [4, 7, 16])
def test_scales_of_any_number_grow_to_the_grid_without_repeating_one(side):
    for num_scales in range(2, side + 1):
        schedule = growth.schedule_of(num_scales, side)
        assert len(schedule) == num_scales and schedule == sorted(set(schedule))
        assert schedule[0] == 1 and schedule[-1] == side
    with pytest.raises(ValueError, match=f"2 to {side} scales, got {side + 1}"):
        growth.schedule_of(side + 1, side)


def test_rows_have_the_medians_and_the_power_of_each_part():
    rounds = [
        {n: {"whole": 3 * n**2 + noise, "decoding": 5.0 * n} for n in (1, 2, 4)}
        for noise in (0, 1, -1)
    ]
    whole, decoding = growth.fitted("sampling", "batch", rounds)
    assert [one["median"] for one in whole["seconds"]] == [3, 12, 48]
    assert (whole["part"], whole["sizes"]) == ("whole", [1, 2, 4])
    assert whole["exponent"] == pytest.approx(2) and decoding["exponent"] == pytest.approx(1)


def test_a_difference_that_is_below_zero_has_no_exponent():
    assert math.isnan(growth.exponent([1, 2], [1, -1]))


def test_how_cost_grows_is_written_drawn_and_told(tmp_path, capsys):
    sweeps = "--scales 2 4 --image-sizes 32 64 --batches 1 2 --depths 1 2".split()
    plot = tmp_path / "growth.png"
    growth.main([*TINY, *sweeps, "--results", str(tmp_path), "--plot", str(plot)])
    rows = json.loads((tmp_path / "growth_fp32.json").read_text())["results"]
    assert [(row["grows"], row["part"], row["sizes"]) for row in rows] == [
        *(("scales", part, [2, 4]) for part in growth.PARTS),
        *(("image_size", part, [32, 64]) for part in growth.PARTS),
        *(("batch", part, [1, 2]) for part in growth.PARTS),
        ("depth", "whole", [1, 2]),
    ]
    for row in rows[::3]:
        assert all(0 < one["low"] <= one["median"] <= one["high"] for one in row["seconds"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| training step | depth | whole | 1: " in capsys.readouterr().out
