"""A few of the mutants of mutations.py, which runs thousands: refused in one line, or accepted."""

import functools
import shutil

import pytest
from tqdm import tqdm

import mutations
from helpers.falling import fall
from helpers.mutant_files import prepare
from mutations import SHARES, trial


@pytest.fixture(scope="module")
def work(trained, tmp_path_factory):
    """What mutants are made of."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(trained, folder / "run")
    prepare(folder)
    return folder


@pytest.mark.parametrize("kind", SHARES)
def test_whatever_is_wrong_is_accepted_or_refused_in_one_line(kind, work, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    count = 5 if kind == "configurations" else 25
    outcomes = [trial(work, 1, 0.0, (kind, number)) for number in range(count)]
    assert [outcome for outcome in outcomes if outcome.verdict == "defect"] == []
    assert "refused" in {outcome.verdict for outcome in outcomes}


@pytest.mark.parametrize("between", [2, 5])
def test_a_mutant_that_ends_its_process_is_a_defect_and_the_others_are_judged(
    between, tmp_path, monkeypatch
):
    monkeypatch.setattr(mutations, "BETWEEN", between)
    items = [("images", number) for number in (2, 3, 4, 5, 6)]
    with tqdm(disable=True) as bar:
        judge = functools.partial(fall, tmp_path)
        found = mutations.judge_all(judge, tmp_path, items, 1, bar)
    assert sorted(outcome.number for outcome in found) == [2, 3, 4, 5, 6]
    assert [outcome.number for outcome in found if outcome.verdict == "defect"] == [3]
    assert list(tmp_path.iterdir()) == []
