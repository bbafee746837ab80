"""However often the drawing of a set is stopped or changed, the set ends the same to the byte."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.command import files
from helpers.sample_sets import SCORED, SETTINGS, Killed, complete, draw, left_in, tiny_drawer
from var_exp.evaluation.samples import sample_set
from var_exp.evaluation.samples.sample_set import SampleSet
from var_exp.sampling.generate import generate
from var_exp.visualization.images import to_uint8

KINDS = [{"png": png, "npz": npz} for png, npz in product((True, False), repeat=2)]


@pytest.fixture(scope="module", autouse=True)
def _small_grid():
    """That shows fewer samples than there are, as that of a large set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_set, "MAX_GRID", 4)
        yield


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer()


@pytest.fixture(scope="module")
def expected(drawer, tmp_path_factory):
    """Called with a number of samples: every file of that set, drawn at once."""
    drawn = {}

    def of(n):
        if n not in drawn:
            folder = tmp_path_factory.mktemp("expected")
            complete(SampleSet(folder, drawer.plan, n), drawer)
            drawn[n] = files(folder)
        return drawn[n]

    return of


# -- stopped at any point, as sample.py is -------------------------------------------------


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """What an uninterrupted scored set leaves."""
    return draw(trained, tmp_path_factory.mktemp("whole"), *SCORED)


@pytest.fixture
def kill_at(monkeypatch):
    """Be killed when a file takes its place, just before or just after it has."""
    real = os.replace

    def install(pattern, after):
        def replace(source, target):
            if not Path(target).match(pattern):
                return real(source, target)
            if after:
                real(source, target)
            raise Killed

        monkeypatch.setattr(os, "replace", replace)

    return install


BEFORE = [
    *("environment.json", "plan.json", "000000.png", "000021.png", "codes/*"),
    *("seen_*/000000-000016*", "seen_*/000016-000032*", "samples.npz", "grid.png"),
    *("coarse_to_fine.png", "metrics.json"),
]
AFTER = ["plan.json", "000039.png", "codes/*", "seen_*/000032-000040*", "samples.npz"]


@pytest.mark.parametrize(
    ("pattern", "after"),
    [pytest.param(pattern, False, id=f"before {pattern}") for pattern in BEFORE]
    + [pytest.param(pattern, True, id=f"after {pattern}") for pattern in AFTER],
)
def test_a_set_killed_at_a_file_ends_as_an_uninterrupted_one(
    pattern, after, whole, trained, tmp_path, kill_at, monkeypatch
):
    kill_at(pattern, after)
    with pytest.raises(Killed):
        draw(trained, tmp_path, *SCORED)
    monkeypatch.undo()
    assert left_in(tmp_path) != whole
    assert draw(trained, tmp_path, *SCORED) == whole


def test_a_set_killed_in_the_midst_of_the_array_ends_as_an_uninterrupted_one(
    whole, trained, tmp_path, monkeypatch
):
    real = sample_set.write_npz

    def write_a_part(path, shape, pixels, labels):
        def until_killed():
            yield next(pixels)
            raise Killed

        real(path, shape, until_killed(), labels)

    monkeypatch.setattr(sample_set, "write_npz", write_a_part)
    with pytest.raises(Killed):
        draw(trained, tmp_path, *SCORED)
    monkeypatch.undo()
    assert "000039.png" in left_in(tmp_path) and "samples.npz" not in left_in(tmp_path)
    assert draw(trained, tmp_path, *SCORED) == whole


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)  # else it is drawn for the pictures alone
def test_a_set_stopped_after_each_batch_draws_each_sample_once(kind, drawer, expected, tmp_path):
    drawn = []
    for _ in range(3):
        samples = SampleSet(tmp_path, drawer.plan, 20, **kind)
        samples.begin()
        first, *_ = samples.jobs(8)
        samples.fill(first, lambda ids: drawn.extend(ids) or drawer.draw(ids))
    assert drawn == list(range(20))
    assert complete(SampleSet(tmp_path, drawer.plan, 20, **kind), drawer) == (None, [])
    assert files(tmp_path) == kept(expected(20), **kind)


def kept(left, png, npz):
    """Of all files of a set those that are kept."""
    return {
        name: content
        for name, content in left.items()
        if (png or not name[0].isdigit()) and (npz or name != "samples.npz")
    }


# -- changed -------------------------------------------------------------------------------


@pytest.mark.parametrize(("earlier", "later"), [(20, 12), (5, 20), (20, 20)])
@pytest.mark.parametrize("first", KINDS, ids=str)
@pytest.mark.parametrize("second", KINDS, ids=str)
def test_a_set_of_other_size_or_files_is_what_it_would_have_been(
    first, second, earlier, later, drawer, expected, tmp_path
):
    complete(SampleSet(tmp_path, drawer.plan, earlier, **first), drawer)
    said, drawn = complete(SampleSet(tmp_path, drawer.plan, later, **second), drawer)
    left = files(tmp_path)
    assert said is None and kept(expected(later), **second).items() <= left.items()
    assert left.items() <= expected(later).items()  # what is not asked for again may stay
    if later <= earlier and any(first.values()):  # pixels are kept, codes for the strip are not
        assert drawn == ([] if later == earlier else list(range(8)))


@pytest.mark.parametrize("now", [5, 20])
def test_a_set_that_was_stopped_may_have_another_size(now, drawer, expected, tmp_path):
    for kind in KINDS:
        samples = SampleSet(tmp_path / str(kind), drawer.plan, 12, **kind)
        samples.begin()
        for job in samples.jobs(8):
            samples.fill(job, drawer.draw)
        complete(SampleSet(samples.folder, drawer.plan, now, **kind), drawer)
        assert files(samples.folder) == kept(expected(now), **kind)


# -- labels, and what was seen --------------------------------------------------------------


def test_the_classes_of_a_plan_take_turns(tmp_path):
    drawer = tiny_drawer(classes=[2, 0])
    samples = SampleSet(tmp_path, drawer.plan, 11)
    assert samples.labels == [2, 0] * 5 + [2]
    complete(samples, drawer)
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_1"].tolist() == samples.labels
        settings = {k: drawer.plan[k] for k in SETTINGS}
        images = generate(drawer.transformer, drawer.tokenizer, samples.labels, **settings)
        assert np.array_equal(saved["arr_0"], to_uint8(images).permute(0, 2, 3, 1).numpy())


def see(ids, samples):
    """Of each sample its number and its mean, and where it has token maps the finest."""
    mean = samples.images.flatten(1).mean(dim=1)
    seen = {"features": torch.stack([torch.tensor(ids).float(), mean], dim=1)}  # (n, 2)
    return seen | ({"scale_features": samples.indices[-1]} if samples.indices else {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_per_scale", [0, 5, 20])
def test_what_was_seen_comes_once_and_in_order_whatever_the_batches_were(
    num_per_scale, kind, drawer, tmp_path
):
    """Batches of 16, then of 8, then of 24, each time but for the last broken off: they overlap."""
    about = {"scores": {"network": "x"}, "num_per_scale": num_per_scale}
    samples = SampleSet(tmp_path, drawer.plan, 30, **kind, **about)
    for batch_size in (16, 8):
        samples.begin()
        for job in samples.jobs(batch_size)[1:2]:
            samples.fill(job, drawer.draw, see)
    samples.begin()
    for job in samples.jobs(24):
        samples.fill(job, drawer.draw, see)
    for run in samples.parts["seen"].runs():  # what no figure needs takes no room
        kept_per_scale = "scale_features" in samples.parts["seen"].read(run)
        assert kept_per_scale == (run.start < num_per_scale)
    found = list(samples.seen())
    ids = torch.cat([ids for ids, _ in found])
    assert ids.tolist() == list(range(30))
    features = torch.cat([seen["features"] for _, seen in found])
    assert features[:, 0].tolist() == list(range(30))
    drawn = to_uint8(drawer.draw(range(30)).images) / 255
    assert torch.allclose(features[:, 1], drawn.flatten(1).mean(dim=1))
    per_scale = [ids for ids, seen in found if "scale_features" in seen]
    assert [i for ids in per_scale for i in ids.tolist()] == list(range(num_per_scale))
