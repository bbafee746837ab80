"""However often the drawing of a set is stopped or changed, the set ends the same to the byte."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.command import files
from helpers.sample_sets import SCORED, Killed, complete, draw, left_in, make_set, tiny_sampler
from var_exp.evaluation.samples import sample_set
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
def sampler():
    return tiny_sampler()


@pytest.fixture(scope="module")
def expected(sampler, tmp_path_factory):
    """Called with a number of samples: every file of that set, drawn at once."""
    drawn = {}

    def of(n):
        if n not in drawn:
            folder = tmp_path_factory.mktemp("expected")
            complete(make_set(folder, sampler, n), sampler)
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
    *("environment.json", "plan.json", "000000.png", "000021.png", "unfinished/record.json"),
    *("unfinished/000000-000016*", "unfinished/.000016-000032*.sha256", "samples.npz"),
    *("grid.png", "coarse_to_fine.png", "metrics.json"),
]
AFTER = [
    *("plan.json", "000039.png", "unfinished/record.json", "unfinished/000032-000040*"),
    *("unfinished/.000016-000032*.sha256", "samples.npz"),
]


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
def test_a_set_stopped_after_each_batch_draws_each_sample_once(kind, sampler, expected, tmp_path):
    drawn = []
    for _ in range(3):
        samples = make_set(tmp_path, sampler, 20, **kind)
        samples.begin()
        first, *_ = samples.missing()
        assert first.draw
        drawn += first.ids
        samples.fill(first, sampler, None)
    assert drawn == list(range(20))
    assert complete(make_set(tmp_path, sampler, 20, **kind), sampler) == (None, [])
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
    first, second, earlier, later, sampler, expected, tmp_path
):
    complete(make_set(tmp_path, sampler, earlier, **first), sampler)
    said, drawn = complete(make_set(tmp_path, sampler, later, **second), sampler)
    left = files(tmp_path)
    assert said is None and kept(expected(later), **second).items() <= left.items()
    assert left.items() <= expected(later).items()  # what is not asked for again may stay
    if later <= earlier and any(first.values()):  # pixels are kept
        assert drawn == []


@pytest.mark.parametrize("now", [5, 20])
def test_a_set_that_was_stopped_may_have_another_size(now, sampler, expected, tmp_path):
    for kind in KINDS:
        samples = make_set(tmp_path / str(kind), sampler, 12, **kind)
        samples.begin()
        for batch in samples.missing():
            samples.fill(batch, sampler, None)
        complete(make_set(samples.folder, sampler, now, **kind), sampler)
        assert files(samples.folder) == kept(expected(now), **kind)


# -- labels, and features -------------------------------------------------------------------


def test_the_classes_of_a_plan_take_turns(tmp_path):
    sampler = tiny_sampler(classes=[2, 0])
    samples = make_set(tmp_path, sampler, 11)
    assert samples.labels == sampler.labels(range(11)) == [2, 0] * 5 + [2]
    complete(samples, sampler)
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_1"].tolist() == samples.labels
        networks = sampler.transformer, sampler.tokenizer
        images = generate(*networks, samples.labels, **sampler.settings)
        assert np.array_equal(saved["arr_0"], to_uint8(images).permute(0, 2, 3, 1).numpy())


class Means:
    """Has of each sample its label and its mean, and where it has token maps the finest."""

    def extract_features(self, tokenizer, samples, labels, per_scale):
        mean = samples.images.flatten(1).mean(dim=1)
        features = {"features": torch.stack([labels.float(), mean], dim=1)}  # (n, 2)
        return features | ({"scale_features": samples.indices[-1]} if per_scale else {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_per_scale", [0, 5, 20])
def test_features_come_once_and_in_order_however_often_it_was_stopped(
    num_per_scale, kind, sampler, tmp_path
):
    """In batches of 16, then of 8, broken off twice: those of another size are drawn again."""
    about = {"scores": {"network": "x"}, "num_per_scale": num_per_scale}
    for batch_size in (16, 8, 8):
        samples = make_set(tmp_path, sampler, 30, batch_size=batch_size, **kind, **about)
        samples.begin()
        for batch in samples.missing()[1:2]:
            samples.fill(batch, sampler, Means())
    samples.begin()
    missing = samples.missing()
    assert [batch.start for batch in missing] == [0, 24]
    for batch in missing:
        samples.fill(batch, sampler, Means())
    found = list(samples.features())
    ids = torch.cat([ids for ids, _ in found])
    assert ids.tolist() == list(range(30))
    features = torch.cat([features["features"] for _, features in found])
    assert features[:, 0].tolist() == samples.labels
    drawn = to_uint8(sampler.sample_batch(range(30)).images) / 255
    assert torch.allclose(features[:, 1], drawn.flatten(1).mean(dim=1))
    per_scale = [ids for ids, features in found if "scale_features" in features]
    assert [i for ids in per_scale for i in ids.tolist()] == list(range(num_per_scale))
