"""References in files: read as they were written, or refused in one line, and never run."""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from helpers.feature_networks import Projection
from helpers.reference_files import (
    NUM_FEATURES,
    NUM_IMAGES,
    SIZE,
    images,
    of_ours,
    statistics,
)
from var_exp.evaluation.reference import reference_from_file, save_reference
from var_exp.io import npz


@pytest.fixture
def network():
    return Projection(SIZE, NUM_FEATURES)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.npz"


def features_of(network, pixels):
    return network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).features


def same(one, other):
    return (
        (one.mu == other.mu).all()
        and (one.sigma == other.sigma).all()
        and one.num_images == other.num_images
        and (one.features is None) == (other.features is None)
        and (one.features is None or torch.equal(one.features, other.features))
        and one.about == other.about
    )


# -- what can be read -------------------------------------------------------------------------


def test_what_we_wrote_comes_back_to_the_bit(network, path):
    for crop in (None, "adm"):
        written = of_ours(network, {"crop": crop})
        save_reference(written, path)
        found = reference_from_file(path, network, SIZE, crop)
        assert same(found, written)
        assert found.mu.dtype == found.sigma.dtype == np.float64
        assert found.indices is None  # which may be of another data set than the caller's


def test_what_was_read_from_a_file_can_be_written_again(network, path):
    np.savez(path, **statistics())
    found = reference_from_file(path, network, SIZE)
    save_reference(found, path)
    assert same(reference_from_file(path, network, SIZE), found)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_alone_are_enough_for_the_frechet_distance(network, path, dtype, save):
    given = statistics(dtype=dtype)
    save(path, **given)
    found = reference_from_file(str(path), network, SIZE)
    assert (found.mu == given["mu"]).all() and (found.sigma == given["sigma"]).all()
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert found.features is found.num_images is found.indices is None
    assert found.about["what"] == "reference.npz" and len(found.about["hash"]) == 16


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_alone_give_statistics_and_features(network, path, save):
    save(path, arr_0=images())
    found = reference_from_file(path, network, SIZE, batch_size=7, limit=5)
    torch.testing.assert_close(found.features, features_of(network, images()))
    expected = fid_features_to_statistics(found.features.double())
    assert (found.mu == expected["mu"]).all() and (found.sigma == expected["sigma"]).all()
    assert found.num_images == found.about["num_images"] == NUM_IMAGES


def test_adms_batches_give_statistics_of_all_and_features_of_some(network, path):
    given, spatial = statistics(), {"mu_s": np.zeros(9), "sigma_s": np.zeros((9, 9))}
    np.savez(path, arr_0=images(), **given, **spatial)
    found = reference_from_file(path, network, SIZE, batch_size=7)
    assert (found.mu == given["mu"]).all() and (found.sigma == given["sigma"]).all()
    assert found.num_images is None and found.about["num_images_of_features"] == NUM_IMAGES
    everything = features_of(network, images())
    torch.testing.assert_close(found.features, everything)
    network.seen = 0
    few = reference_from_file(path, network, SIZE, batch_size=7, limit=10).features
    assert len(few) == network.seen == 10
    nearest = (few[:, None] - everything).norm(dim=2).min(dim=1)
    assert nearest.values.max() < 1e-3 and (nearest.indices.diff() > 0).all()
    assert nearest.indices.max() - nearest.indices.min() > 15


def test_images_are_read_one_at_a_time(path):
    pixels = images(4000, (16, 16))  # 3 MB
    np.savez(path, arr_0=pixels)
    tracemalloc.start()
    try:
        sums = [int(row.sum()) for row in npz.rows(path, "arr_0")]
        assert tracemalloc.get_traced_memory()[1] < pixels.nbytes / 4
    finally:
        tracemalloc.stop()
    assert sums == pixels.sum(axis=(1, 2, 3)).tolist()


def test_arrays_stored_by_columns_are_read_whole_but_not_by_rows(network, path):
    given, skew = statistics(), 1e-6 * np.eye(6)[0]  # by which rows and columns differ
    np.savez(path, mu=given["mu"], sigma=np.asfortranarray(given["sigma"] + skew))
    found = reference_from_file(path, network, SIZE)
    assert (found.sigma == given["sigma"] + skew).all()
    np.savez(path, arr_0=np.asfortranarray(images()))
    with pytest.raises(ValueError, match="by columns .*ascontiguousarray"):
        reference_from_file(path, network, SIZE)


# -- what cannot ------------------------------------------------------------------------------


def write_nothing(path):
    pass


def write_text(path):
    path.write_text("mu,sigma\n")


def write_folder(path):
    path.mkdir()


def write_npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write(change):
    """`change` of good statistics, as an .npz."""
    return lambda path: np.savez(path, **change(statistics()))


def with_nan(arrays):
    arrays["sigma"][2, 3] = np.nan
    return arrays


REFUSED = {
    "missing": (write_nothing, "reference.npz is missing; expected an .npz with mu and sigma"),
    "text": (write_text, "damaged or no .npz"),
    "folder": (write_folder, "cannot be read .Is a directory.; expected an .npz"),
    "npy": (write_npy, "damaged or no .npz"),
    "no arrays": (write(lambda _: {}), "holds nothing; expected an .npz"),
    "other arrays": (write(lambda _: {"x": 1, "mu": 2}), "holds mu, x; expected an .npz"),
    "other network": (write(lambda _: statistics(5)), r"mu \(5,\) .* expected 6 .*another network"),
    "sigma": (write(lambda x: x | {"sigma": np.eye(5)}), r"sigma \(5, 5\), expected 6 features"),
    "nan": (write(with_nan), "not all finite"),
    "integers": (write(lambda x: x | {"mu": np.arange(6)}), "mu and sigma of int64 .* not all fin"),
    "small": (write(lambda _: {"arr_0": images(size=(8, 8))}), r"\(8, 8\), expected \(8, 10\)"),
    "floats": (write(lambda _: {"arr_0": images() / 255}), "arr_0 of float64"),
    "channels first": (
        write(lambda _: {"arr_0": images().transpose(0, 3, 1, 2)}),
        r"arr_0 of uint8 \(30, 3, 8, 10\); expected images, uint8 \(N, H, W, C\)",
    ),
    "no images": (write(lambda x: x | {"arr_0": images(0)}), r"arr_0 of uint8 \(0, 8, 10, 3\)"),
    "scalar": (write(lambda _: {"arr_0": np.uint8(3)}), r"arr_0 of uint8 \(\)"),
    "objects": (write(lambda x: x | {"mu": np.array([{}] * 6)}), "holds pickled objects"),
    "object images": (write(lambda _: {"arr_0": np.array([{}])}), "holds pickled objects"),
    "about": (write(lambda x: x | {"about": "no json"}), "something else under our names"),
    "about a list": (write(lambda x: x | {"about": "[1]"}), "something else under our names"),
    "about alone": (write(lambda _: {"about": "{}"}), "lacks mu, sigma"),
    "features": (
        write(lambda x: x | {"about": "{}", "features": np.zeros((3, 5))}),
        "do not fit together",
    ),
    "features nan": (
        write(lambda x: x | {"about": "{}", "features": np.full((3, 6), np.nan)}),
        "not finite",
    ),
    "words": (
        write(lambda x: x | {"about": "{}", "mu": x["mu"].astype("S")}),
        "something else under our names",
    ),
    "dates": (
        write(lambda x: x | {"about": "{}", "mu": np.zeros(6, "datetime64[s]")}),
        "something else under our names",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_explained_in_one_line(mistake, network, path):
    make, words = REFUSED[mistake]
    make(path)
    with pytest.raises(ValueError, match=words) as refused:
        reference_from_file(path, network, SIZE)
    assert str(refused.value).startswith(f"evaluation.reference: {path} ")
    assert "\n" not in str(refused.value) and "; " in str(refused.value)
    assert network.seen == 0


@pytest.mark.parametrize(
    "about",
    [
        {"network": "inception"},
        {"network_weights": "0" * 16},
        {"image_size": [8, 8]},
        {"crop": "var"},
    ],
)
def test_ours_of_another_network_size_or_crop_is_refused(about, network, path):
    save_reference(of_ours(network, about), path)
    ((key, given),) = about.items()
    with pytest.raises(ValueError) as refused:
        reference_from_file(path, network, SIZE)
    assert f"was made with {key} = {given}, expected " in str(refused.value)
    assert str(refused.value).startswith(f"evaluation.reference: {path} ")


@pytest.mark.parametrize("change", [lambda s: -s, lambda s: s + np.triu(np.ones_like(s))])
def test_a_sigma_that_is_no_covariance_is_refused(change, network, path):
    good = statistics()
    np.savez(path, mu=good["mu"], sigma=change(good["sigma"]))
    with pytest.raises(ValueError, match="no covariance"):
        reference_from_file(path, network, SIZE)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickled_objects_are_not_run(network, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mu", "sigma", "arr_0", "about", "features"):
        np.savez(path, **statistics() | {name: np.array([Trap()])})
        if name != "features":  # which nobody asks for in a file that is not ours
            with pytest.raises(ValueError, match="pickled objects"):
                reference_from_file(path, network, SIZE)
        else:
            reference_from_file(path, network, SIZE)
    assert not (tmp_path / "sprung").exists()


def test_a_header_that_asks_for_all_memory_is_refused(network, path):
    content = statistics()
    np.savez(path, **content)
    big = path.read_bytes().replace(b"'shape': (6,), }  ", b"'shape': (6" + b"0" * 2 + b",), }")
    path.write_bytes(big)
    with pytest.raises(ValueError, match="is damaged"):
        reference_from_file(path, network, SIZE)


@pytest.mark.parametrize("kind", ["ours", "statistics", "images"])
def test_a_damaged_file_is_refused_or_read_as_it_was(kind, network, path):
    """Cut anywhere, or with bits flipped anywhere, names and sizes in the archive included."""
    if kind == "ours":
        save_reference(of_ours(network), path)
    else:
        np.savez(path, **(statistics() if kind == "statistics" else {"arr_0": images(5)}))
    whole, expected = path.read_bytes(), reference_from_file(path, network, SIZE)
    rng, num_refused = np.random.default_rng(0), 0
    for trial in range(100):
        content = bytearray(whole)
        if trial % 4 == 0:
            del content[int(rng.integers(len(whole))) :]
        else:
            for place in rng.integers(len(whole), size=1 + trial % 2):
                content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            found = reference_from_file(path, network, SIZE)
        except ValueError as error:
            assert str(error).startswith("evaluation.reference: ") and "\n" not in str(error)
            num_refused += 1
        else:
            found.about["hash"] = expected.about["hash"] = ""  # of the file's bytes
            assert same(found, expected)
    assert num_refused > 50
