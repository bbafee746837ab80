"""A few of the mutants of mutations.py, which runs thousands: refused in one line, or accepted."""

import shutil

import pytest

from mutant_files import prepare
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
