"""Files of many samples: whole or found out, and never more in memory than a few images."""

import tracemalloc

import numpy as np
import pytest
import torch

from helpers.command import files
from helpers.sample_sets import complete, tiny_drawer
from var_exp.evaluation.samples.files import (
    PNG_END,
    Parts,
    is_whole_png,
    open_npz,
    read_png,
    write_npz,
)
from var_exp.evaluation.samples.sample_set import SampleSet
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


def test_a_png_file_with_a_hole_is_refused_or_read_as_it_was(tmp_path):
    path, pixels, read = tmp_path / "x.png", noise(6, 6, 3), 0
    save_png(pixels, path)
    content = path.read_bytes()
    for start in range(len(content)):
        path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])
        found = refused(read_png, path)
        if not isinstance(found, str):
            assert np.array_equal(found, pixels)
            read += 1
    assert read < len(content) / 4


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
def test_an_array_with_a_bit_flipped_is_refused_or_has_the_shape_it_had(bit, tmp_path):
    path, pixels = tmp_path / "x.npz", noise(3, 2, 2, 1)
    write_npz(path, pixels.shape, [pixels], np.arange(3))
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= bit
        path.write_bytes(flipped)
        found = refused(open_npz, path)
        if not isinstance(found, str):
            assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype)


# -- tensors of runs of samples -------------------------------------------------------------


def test_parts_come_back_by_run_and_by_sample(tmp_path):
    parts, values = Parts(tmp_path / "deep"), torch.arange(40).reshape(20, 2)
    assert parts.runs() == [] and parts.rows("x", [3]) == {}
    for run in (range(8, 20), range(4, 12), range(0, 2)):
        parts.write(run, {"x": values[run.start : run.stop], "y": torch.ones(len(run))})
    assert parts.runs() == [range(0, 2), range(4, 12), range(8, 20)]
    assert set(parts.read(range(4, 12))) == {"x", "y"}
    assert torch.equal(parts.read(range(4, 12))["x"], values[4:12])
    rows = parts.rows("x", [19, 3, 0, 9])  # 3 is nowhere, 9 in two runs
    assert {i: row.tolist() for i, row in rows.items()} == {0: [0, 1], 9: [18, 19], 19: [38, 39]}


def test_a_part_that_is_a_slice_of_more_is_written(tmp_path):
    parts, values = Parts(tmp_path), torch.arange(24).reshape(4, 6)
    parts.write(range(0, 4), {"x": values[:, ::2]})
    assert torch.equal(parts.read(range(0, 4))["x"], values[:, ::2])


def test_a_part_cut_anywhere_is_refused(tmp_path):
    parts, run = Parts(tmp_path), range(16, 32)
    parts.write(run, {"x": torch.arange(16)})
    content = parts.path(run).read_bytes()
    for length in range(len(content)):
        parts.path(run).write_bytes(content[:length])
        assert refused(lambda _: parts.read(run), parts.path(run)) == "refused"
        assert parts.runs() == []


# -- and drawn again ------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda content: b"",
    "its head alone": lambda content: content[:10],
    "all but a byte": lambda content: content[:-1],
    "another file": lambda content: b"\1" * 200,
}


@pytest.fixture(scope="module")
def drawer():
    return tiny_drawer()


@pytest.fixture(scope="module")
def whole(drawer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    complete(SampleSet(folder, drawer.plan, 20), drawer)
    return files(folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_png_that_is_not_whole_is_drawn_again(damage, drawer, whole, tmp_path):
    samples = SampleSet(tmp_path, drawer.plan, 20)
    complete(samples, drawer)
    path = tmp_path / "000009.png"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    (tmp_path / "samples.npz").unlink()  # or its pixels would be there
    _, drawn = complete(samples, drawer)
    assert drawn == list(range(8, 16)) and files(tmp_path) == whole


def test_a_png_that_does_not_decode_is_drawn_again_by_the_same_command(drawer, whole, tmp_path):
    samples = SampleSet(tmp_path, drawer.plan, 20)
    complete(samples, drawer)
    content = bytearray((tmp_path / "000009.png").read_bytes())
    content[30:60] = bytes(30)
    (tmp_path / "000009.png").write_bytes(content)
    (tmp_path / "samples.npz").unlink()
    with pytest.raises(ValueError, match=r"000009\.png was damaged and is deleted"):
        complete(samples, drawer)
    _, drawn = complete(samples, drawer)
    assert drawn == list(range(8, 16)) and files(tmp_path) == whole


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("png", [True, False])
def test_a_damaged_array_is_written_again_by_the_same_command(damage, png, drawer, whole, tmp_path):
    samples = SampleSet(tmp_path, drawer.plan, 20, png=png)
    complete(samples, drawer)
    path = tmp_path / "samples.npz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"samples\.npz was damaged and is deleted"):
        complete(samples, drawer)
    _, drawn = complete(samples, drawer)
    assert drawn == ([] if png else list(range(20)))
    assert files(tmp_path) == {k: v for k, v in whole.items() if png or not k[0].isdigit()}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["pixels", "codes", "seen"])
def test_a_damaged_part_is_drawn_again_by_the_same_command(damage, kind, drawer, whole, tmp_path):
    samples = SampleSet(tmp_path, drawer.plan, 20, png=False, scores={"network": "x"})

    def see(ids, drawn):
        return {"features": drawn.images.flatten(1)}

    def go_on():
        samples.begin()
        for job in samples.jobs(8):
            samples.fill(job, drawer.draw, see)
        seen = torch.cat([seen["features"] for _, seen in samples.seen()])
        samples.finish(drawer.tokenizer, ["a", "b", "c"], 8)
        return seen

    samples.begin()
    for job in samples.jobs(8):
        samples.fill(job, drawer.draw, see)
    run = samples.parts[kind].runs()[0]
    path = samples.parts[kind].path(run)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} was damaged and is deleted"):
        go_on()
    seen = go_on()
    samples.clear()
    assert files(tmp_path) == {k: v for k, v in whole.items() if not k[0].isdigit()}
    pixels = torch.from_numpy(samples.pixels(range(20))).permute(0, 3, 1, 2) / 255
    assert torch.equal(seen, pixels.flatten(1))
