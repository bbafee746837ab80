"""References: computed once for each set of images, network and number, and never mistaken."""

import datetime
import functools
import shutil

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from helpers.feature_networks import Projection
from var_exp.data.source import ImageSource, TensorImages
from var_exp.evaluation import reference
from var_exp.evaluation.reference import data_fingerprint, reference_from_file, reference_of

NUM_IMAGES = 41
projection = functools.partial(Projection, (8, 8))


class Images(ImageSource):
    """Random images; `brighter` of them have one pixel that is not as before."""

    def __init__(
        self, name="images", count=NUM_IMAGES, size=8, classes="ab", brighter=(), crop=None
    ):
        super().__init__(name, size, 3, tuple(classes))
        self.crop = crop
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 255, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        pixels[list(brighter), 0, 0, 0] += 1
        self.parts = (pixels, pixels.flip(0)[:20])
        self.setup()

    def load(self):
        return tuple(TensorImages(x, torch.zeros(len(x))) for x in self.parts)


def assert_same(one, other):
    """To the last bit."""
    assert one.mu.dtype == one.sigma.dtype == np.float64
    assert (one.mu == other.mu).all() and (one.sigma == other.sigma).all()
    assert torch.equal(one.features, other.features)
    assert one[2] == other[2] and one[4:] == other[4:]


# -- what it holds ----------------------------------------------------------------------------


def test_statistics_are_torch_fidelitys_of_the_images_in_their_order():
    network, source = projection(), Images()
    found = reference_of(network, source, "train", batch_size=8)
    features = network(source.parts[0]).features
    torch.testing.assert_close(found.features, features)
    expected = fid_features_to_statistics(found.features.double())
    assert (found.mu == expected["mu"]).all() and (found.sigma == expected["sigma"]).all()
    assert found.indices == list(range(NUM_IMAGES)) and found.num_images == NUM_IMAGES
    assert found.about == {
        "what": "images train",
        "num_images": NUM_IMAGES,
        "hash": data_fingerprint(source, "train"),
        "network": "projection",
        "network_weights": network.fingerprint,
        "num_features": 6,
        "image_size": [8, 8],
        "crop": None,
    }


def test_of_many_images_some_are_drawn_from_everywhere_and_fewer_are_a_part_of_more():
    network, source = projection(), Images(count=1000)
    few, more = (reference_of(network, source, "train", limit) for limit in (50, 100))
    assert few.num_images == len(few.features) == 50 and set(few.indices) < set(more.indices)
    assert few.indices == sorted(few.indices)
    assert np.histogram(few.indices, bins=4, range=(0, 1000))[0].min() > 5
    features = network(source.parts[0][few.indices]).features
    torch.testing.assert_close(few.features, features)


def test_one_image_gives_numbers():
    found = reference_of(projection(), Images(), "val", limit=1)
    assert np.isfinite(found.mu).all() and (found.sigma == 0).all() and len(found.features) == 1


def test_a_reference_read_in_inference_mode_is_good_outside_of_it_too(tmp_path):
    for _ in ("made", "kept"):
        with torch.inference_mode():
            found = reference_of(projection(), Images(), "train", cache=tmp_path)
        assert not found.features.is_inference()


def test_the_bar_is_for_terminals_only(capfd):
    reference_of(projection(), Images(), "train")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("limit, count", [(0, 5), (None, 0), (-3, 5)])
def test_a_reference_of_no_images_is_refused(limit, count):
    with pytest.raises(ValueError, match=rf"of {count} train images of .*\(evaluation.num_refer"):
        reference_of(projection(), Images(count=count), "train", limit)


def test_features_that_are_no_numbers_are_refused(tmp_path):
    network = projection()
    network.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="seen by projection, hold nan"):
        reference_of(network, Images(), "train", cache=tmp_path)
    assert not list(tmp_path.iterdir())


# -- the cache --------------------------------------------------------------------------------


def test_it_is_computed_once(tmp_path):
    network = projection()
    first = reference_of(network, Images(), "train", 30, cache=tmp_path / "new" / "folder")
    assert network.seen == 30
    again = reference_of(network, Images(), "train", 30, cache=tmp_path / "new" / "folder")
    other_run = reference_of(projection(), Images(), "train", 30, 7, tmp_path / "new" / "folder")
    assert network.seen == 30
    assert len(list(tmp_path.rglob("*.*"))) == 1
    assert_same(first, again)
    assert_same(first, other_run)


def test_without_a_cache_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference_of(projection(), Images(), "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "network, source, part, limit",
    [
        (projection(seed=1), Images(), "train", 20),
        (projection(num_features=5), Images(), "train", 20),
        (projection(), Images(name="others"), "train", 20),
        (projection(), Images(count=42), "train", 20),
        (projection(), Images(classes="abc"), "train", 20),
        (projection(), Images(brighter=[40]), "train", 20),
        (projection(), Images(crop="adm"), "train", 20),
        (projection(), Images(size=9), "train", 20),
        (projection(), Images(), "val", 20),
        (projection(), Images(), "train", 21),
    ],
)
def test_whatever_it_depends_on_makes_another_file(network, source, part, limit, tmp_path):
    before = reference_of(projection(), Images(), "train", 20, cache=tmp_path)
    found = reference_of(network, source, part, limit, cache=tmp_path)
    assert network.seen == limit
    assert len(list(tmp_path.iterdir())) == 2
    assert found.about != before.about
    again = reference_of(projection(), Images(), "train", 20, cache=tmp_path)
    assert_same(before, again)


def test_another_name_of_the_network_makes_another_file(tmp_path):
    network, renamed = projection(), projection()
    renamed.name = "renamed"
    for each in (network, renamed):
        reference_of(each, Images(), "train", cache=tmp_path)
    assert renamed.seen == NUM_IMAGES and len(list(tmp_path.iterdir())) == 2


def test_a_fingerprint_looks_at_images_of_the_whole_set():
    many = {"count": 6400}
    plain = data_fingerprint(Images(**many), "train")
    assert plain == data_fingerprint(Images(**many), "train")
    for i in (0, 6399):
        assert data_fingerprint(Images(**many, brighter=[i]), "train") != plain
    assert data_fingerprint(Images(**many, brighter=[1]), "train") == plain


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty", "text"])
def test_a_file_that_cannot_be_believed_is_made_anew(damage, tmp_path):
    first = reference_of(projection(), Images(), "train", cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "other":
        reference_of(projection(), Images(), "val", cache=tmp_path / "val")
        shutil.copy(*(tmp_path / "val").iterdir(), path)
    elif damage == "flipped":
        content[content.index(first.features.numpy().tobytes()) + 5] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes({"cut": content[:-200], "empty": b"", "text": b"no zip"}[damage])
    network = projection()
    with pytest.warns(UserWarning, match="made again") as warned:
        assert_same(reference_of(network, Images(), "train", cache=tmp_path), first)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert network.seen == NUM_IMAGES
    assert_same(reference_of(network, Images(), "train", cache=tmp_path), first)
    assert network.seen == NUM_IMAGES


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("where a folder should be")
    with pytest.warns(UserWarning, match="is not kept for other runs"):
        found = reference_of(projection(), Images(), "train", cache=tmp_path / "file")
    assert_same(found, reference_of(projection(), Images(), "train"))


# -- processes --------------------------------------------------------------------------------


def test_two_processes_make_the_reference_of_one(tmp_path):
    """Each sees a part, one writes, both read; 41 images, and 3 of which one process has none."""
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=Images().parts[0].permute(0, 2, 3, 1).numpy())
    other = torch.multiprocessing.get_context("fork").Process(
        target=make_as_rank, args=(1, tmp_path)
    )
    other.start()
    make_as_rank(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    expected = [
        reference_of(projection(), Images(), "train", batch_size=8),
        reference_of(projection(), Images(), "train", 3, batch_size=8),
        reference_from_file(images, projection(), (8, 8), batch_size=8),
    ]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for found in both:
        for one, two in zip([expected[0], *expected], found["references"], strict=True):
            assert_same(one, two)
    # Images 8 to 15, 24 to 31 and 40 fall to the second process.
    assert [found["seen"] for found in both] == [[24, 24, 48, 51, 75], [17, 17, 34, 34, 51]]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def make_as_rank(rank, folder):
    distributed, timeout = torch.distributed, datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    network, seen, cache = projection(), [], folder / "cache"

    def make(limit=None):
        found = reference_of(network, Images(), "train", limit, 8, cache)
        seen.append(network.seen)
        return found

    try:
        references = [make(), make()]
        read = reference._kept
        if rank == 1:  # as on a disk where a file is seen late
            reference._kept = lambda *_: None
        make()
        reference._kept = read
        references.append(make(limit=3))
        file = folder / "images.npz"
        references.append(reference_from_file(file, network, (8, 8), batch_size=8))
        seen.append(network.seen)
    finally:
        distributed.destroy_process_group()
    torch.save({"references": references, "seen": seen}, folder / f"{rank}.pt")
