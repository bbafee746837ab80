"""Progressive training adds scales at equal distances, reaches the last, resumes at a border."""

import pytest

from helpers.stages import NUM_BATCHES, Interrupt, assert_equal, run, weights
from var_exp.training.progressive import ProgressiveScales


def test_scales_come_in_one_by_one_at_equal_distances():
    plan = ProgressiveScales(first=2, until=0.6, ramp=0.0)
    seen = {p / 10: plan(p / 10, 5).num_scales for p in range(10)}
    assert seen == {0.0: 2, 0.1: 2, 0.2: 3, 0.3: 3, 0.4: 4, 0.5: 4} | {
        p / 10: 5 for p in range(6, 10)
    }
    assert plan(0.5999, 5).num_scales == 4


def test_the_loss_of_a_new_scale_rises_over_the_ramp():
    plan = ProgressiveScales(first=2, until=0.6, ramp=0.1)
    assert plan(0.0, 5).weight == 1.0
    assert plan(0.2, 5).weight == 0.01
    assert plan(0.25, 5).weight == pytest.approx(0.5)
    assert plan(0.35, 5).weight == 1.0
    assert plan(0.99, 5) == (5, 1.0)


def test_all_scales_at_once_are_all_scales():
    assert ProgressiveScales(first=5)(0.0, 5) == (5, 1.0)


@pytest.mark.parametrize("changes", [{"until": 1.0}, {"until": 0.0}, {"first": 0}, {"ramp": 1.0}])
def test_what_can_never_work_is_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        ProgressiveScales(**changes)


def test_a_plan_that_never_reaches_the_last_scale_is_refused():
    plan = ProgressiveScales(first=1, until=0.9)
    plan.check(3, num_batches=100)
    with pytest.raises(ValueError, match="never be trained: at the last of 4 batches 2 of 3"):
        plan.check(3, num_batches=4)
    with pytest.raises(ValueError, match="there are 3 scales"):
        ProgressiveScales(first=4).check(3, num_batches=100)


# Of eight batches the first two train one scale, the next two two, the rest all three.
PLAN = ProgressiveScales(first=1, until=0.5, ramp=0.2)


def test_a_refused_plan_leaves_nothing_behind(digits, tmp_path):
    with pytest.raises(ValueError, match="never be trained"):
        run("var", digits, tmp_path, progressive=ProgressiveScales(first=1, until=0.95))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kills", [(2, 4), (3, 5), (4, 4)], ids=str)
def test_a_run_that_is_killed_at_a_border_equals_the_uninterrupted(kills, digits, tmp_path):
    _, whole = run("var", digits, tmp_path / "whole", val_every=2, progressive=PLAN)
    for callbacks in ([Interrupt(kills[0])], [Interrupt(kills[1])], []):
        _, part = run("var", digits, tmp_path / "parts", *callbacks, val_every=2, progressive=PLAN)
        assert part == {batch: whole[batch] for batch in part}
    assert NUM_BATCHES in part
    assert_equal(weights(tmp_path / "parts", "var"), weights(tmp_path / "whole", "var"))
