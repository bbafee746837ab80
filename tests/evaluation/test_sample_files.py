"""Files of many samples: whole or found out, and never more in memory than a few images."""

import tracemalloc

import numpy as np
import pytest
import torch

from helpers.command import files
from helpers.sample_sets import complete, make_set, tiny_sampler
from var_exp.evaluation.samples.files import (
    PNG_END,
    is_whole_png,
    open_npz,
    read_png,
    write_npz,
)
from var_exp.visualization.images import save_png


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def refused(read, path):
    """Whether reading a file names and deletes it; else what was read."""
    try:
        return read(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} was damaged and is deleted") and not path.exists()
        return "refused"


# -- PNG files ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_file_comes_back(channels, tmp_path):
    save_png(noise(8, 9, channels), tmp_path / "x.png")
    assert np.array_equal(read_png(tmp_path / "x.png"), noise(8, 9, channels))
    assert is_whole_png(tmp_path / "x.png")


def test_a_png_file_cut_anywhere_is_not_whole(tmp_path):
    path = tmp_path / "x.png"
    save_png(noise(4, 4, 3), path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not is_whole_png(path)
    path.write_bytes(PNG_END[1:])
    assert not is_whole_png(path)


def test_a_png_file_with_any_bit_flipped_is_refused_or_read_as_it_was(tmp_path):
    path, pixels = tmp_path / "x.png", noise(6, 6, 3)
    save_png(pixels, path)
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = refused(read_png, path)
        assert isinstance(found, str) or np.array_equal(found, pixels)


def test_a_png_file_with_a_hole_between_its_chunks_is_refused(tmp_path):
    path = tmp_path / "x.png"
    save_png(noise(200, 200, 3), path)
    content = path.read_bytes()
    second = content.rindex(b"IDAT")
    assert second > len(content) / 3
    for start in range(second - 8, second + 4):
        path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])
        assert refused(read_png, path) == "refused"


# -- one array ------------------------------------------------------------------------------


def test_the_array_written_in_pieces_is_the_file_that_numpy_writes(tmp_path):
    pixels, labels = noise(50, 4, 5, 3), np.arange(50)
    pieces = (pixels[i : i + 7] for i in range(0, 50, 7))
    write_npz(tmp_path / "ours.npz", pixels.shape, pieces, labels)
    np.savez(tmp_path / "theirs.npz", pixels, labels)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    with np.load(tmp_path / "ours.npz") as ours:
        assert np.array_equal(ours["arr_0"], pixels) and np.array_equal(ours["arr_1"], labels)
    assert np.array_equal(open_npz(tmp_path / "theirs.npz"), pixels)
    assert open_npz(tmp_path / "none.npz") is None


def test_an_array_is_written_and_read_a_few_images_at_a_time(tmp_path):
    path, shape = tmp_path / "x.npz", (100, 64, 64, 3)
    pieces = (np.full((2, 64, 64, 3), i, np.uint8) for i in range(50))
    tracemalloc.start()
    write_npz(path, shape, pieces, np.zeros(100))
    rows = open_npz(path)
    assert [rows[i, 5, 5, 0] for i in (0, 99)] == [0, 49]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 64 * 64 * 3  # bytes; of 100 images


def test_an_array_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    write_npz(path, (3, 2, 2, 1), [noise(3, 2, 2, 1)], np.arange(3))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert refused(open_npz, path) == "refused"


@pytest.mark.parametrize("bit", [1, 64])
def test_an_array_with_a_bit_flipped_is_refused_or_read_as_it_was(bit, tmp_path):
    path, pixels = tmp_path / "x.npz", noise(3, 2, 2, 1)
    write_npz(path, pixels.shape, [pixels], np.arange(3))
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= bit
        path.write_bytes(flipped)
        found = refused(open_npz, path)
        if not isinstance(found, str):
            assert np.array_equal(found, pixels)


# -- and drawn again ------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda content: b"",
    "its head alone": lambda content: content[:10],
    "all but a byte": lambda content: content[:-1],
    "another file": lambda content: b"\1" * 200,
}


@pytest.fixture(scope="module")
def sampler():
    return tiny_sampler()


@pytest.fixture(scope="module")
def whole(sampler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    complete(make_set(folder, sampler, 20), sampler)
    return files(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_png_that_is_not_whole_is_drawn_again(damage, sampler, whole, tmp_path):
    samples = make_set(tmp_path, sampler, 20)
    complete(samples, sampler)
    path = tmp_path / "000009.png"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    (tmp_path / "samples.npz").unlink()  # or its pixels would be there
    _, drawn = complete(samples, sampler)
    assert drawn == list(range(8, 16)) and files(tmp_path) == whole


def test_a_png_that_does_not_decode_is_drawn_again_by_the_same_command(sampler, whole, tmp_path):
    samples = make_set(tmp_path, sampler, 20)
    complete(samples, sampler)
    content = bytearray((tmp_path / "000009.png").read_bytes())
    content[30:60] = bytes(30)
    (tmp_path / "000009.png").write_bytes(content)
    (tmp_path / "samples.npz").unlink()
    with pytest.raises(ValueError, match=r"000009\.png was damaged and is deleted"):
        complete(samples, sampler)
    _, drawn = complete(samples, sampler)
    assert drawn == list(range(8, 16)) and files(tmp_path) == whole


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("png", [True, False])
def test_a_damaged_array_is_written_again(damage, png, sampler, whole, tmp_path):
    samples = make_set(tmp_path, sampler, 20, png=png)
    complete(samples, sampler)
    path = tmp_path / "samples.npz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"samples\.npz was damaged and is deleted"):
        complete(samples, sampler)
    _, drawn = complete(samples, sampler)
    assert drawn == ([] if png else list(range(20)))
    assert files(tmp_path) == {k: v for k, v in whole.items() if png or not k[0].isdigit()}


@pytest.mark.parametrize("damage", [*DAMAGE, "a bit"])
def test_a_damaged_batch_is_named_and_drawn_again(damage, sampler, whole, tmp_path, capsys):
    samples = make_set(tmp_path, sampler, 20, png=False, scores={"network": "x"})
    samples.begin()
    for batch in samples.missing():
        samples.fill(batch, sampler, Pixels())
    path = samples.parts.folder / "000008-000016.npz"
    change = DAMAGE.get(damage, lambda content: content[:300] + b"\1" + content[301:])
    path.write_bytes(change(path.read_bytes()))
    samples.begin()
    (batch,) = samples.missing()
    assert batch.draw and batch.ids == range(8, 16)
    assert f"{str(path)!r} is damaged" in capsys.readouterr().err
    samples.fill(batch, sampler, Pixels())
    features = torch.cat([features["features"] for _, features in samples.features()])
    samples.finish(sampler, ["a", "b", "c"])
    samples.clear()
    assert files(tmp_path) == {k: v for k, v in whole.items() if not k[0].isdigit()}
    pixels = torch.from_numpy(samples.pixels(range(20))).permute(0, 3, 1, 2) / 255
    assert torch.equal(features, pixels.flatten(1))


class Pixels:
    """A scorer whose features are the pixels."""

    def extract_features(self, tokenizer, samples, labels, per_scale):
        return {"features": samples.images.flatten(1)}
