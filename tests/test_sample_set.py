"""However often the drawing of a set is stopped, the set ends the same to the byte."""

import json
import os

import numpy as np
import pytest
import torch

from command import files, run, run_for_real
from var_exp.evaluation import sample_draw
from var_exp.evaluation.sample_files import (
    PNG_END,
    Parts,
    is_whole_png,
    open_npz,
    read_png,
    write_npz,
)
from var_exp.evaluation.scorer import SampleScorer

SCORED = ["evaluate=true", "num_samples=40", "batch_size=16", "evaluation.num_samples_per_scale=20"]
OF_RUN = (".hydra", "environment.json")  # when and how it was run


class Killed(BaseException):
    """What a kill looks like from within a test: nothing catches it."""


def draw(ckpt, out, *overrides):
    """Run sample.py; what it leaves, but for what tells of the run itself."""
    done = run("sample", f"ckpt={ckpt}", f"out_dir={out}", *overrides)
    assert done.code == 0, done.err
    return left_in(out)


def left_in(out):
    return {k: v for k, v in files(out).items() if not k.startswith(OF_RUN)}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """What an uninterrupted scored set leaves, and how many files took their place for it."""
    replaced, real = [], os.replace
    draw(trained, tmp_path_factory.mktemp("first"), *SCORED)  # the statistics of real images
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (replaced.append(b), real(a, b)))
        left = draw(trained, out, *SCORED)
    return left, len(replaced)


@pytest.fixture
def kill_at(monkeypatch):
    """Be killed when the n-th file takes its place, just before or just after it has."""
    real = os.replace

    def install(n, after):
        count = iter(range(10_000))

        def replace(source, target):
            if next(count) != n:
                return real(source, target)
            if after:
                real(source, target)
            raise Killed

        monkeypatch.setattr(os, "replace", replace)

    yield install
    monkeypatch.setattr(os, "replace", real)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.7, 0.9, 0.95, 0.98, 1.0])
def test_a_set_killed_at_any_file_ends_as_an_uninterrupted_one(
    share, after, whole, trained, tmp_path, kill_at, monkeypatch
):
    expected, num_files = whole
    kill_at(round(share * (num_files - 1)), after)
    with pytest.raises(Killed):
        draw(trained, tmp_path, *SCORED)
    monkeypatch.undo()
    assert left_in(tmp_path) != expected or share == 1.0
    assert draw(trained, tmp_path, *SCORED) == expected


def count_calls(monkeypatch, owner, name):
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    return calls


def test_what_is_finished_is_neither_drawn_nor_seen_again(whole, trained, tmp_path, monkeypatch):
    draw(trained, tmp_path, *SCORED)
    drawn = count_calls(monkeypatch, sample_draw, "iterate_samples")
    seen = count_calls(monkeypatch, SampleScorer, "see")
    assert draw(trained, tmp_path, *SCORED) == whole[0]
    assert drawn == seen == []


def test_scores_of_a_finished_set_see_its_files_and_draw_only_what_scales_need(
    whole, trained, tmp_path, monkeypatch
):
    plain = [o for o in SCORED if "evalua" not in o]
    draw(trained, tmp_path, *plain)
    drawn = count_calls(monkeypatch, sample_draw, "iterate_samples")
    ours, theirs = draw(trained, tmp_path, *SCORED), whole[0]
    assert ours == theirs
    # The first 20 are scored after each scale, for which the codes are needed: two batches of 16.
    assert len(drawn) == 2


def test_a_set_grows_and_shrinks_and_is_each_time_what_it_would_have_been(trained, tmp_path):
    sizes = {n: draw(trained, tmp_path / str(n), f"num_samples={n}") for n in (5, 40)}
    for n in (5, 40, 5):
        assert draw(trained, tmp_path / "one", f"num_samples={n}", "batch_size=16") == sizes[n]


@pytest.mark.parametrize("png", ["true", "false"])
@pytest.mark.parametrize("npz", ["true", "false"])
def test_files_are_kept_as_asked_and_the_pictures_do_not_depend_on_it(
    png, npz, whole, trained, tmp_path
):
    left = draw(trained, tmp_path, *SCORED, f"png={png}", f"npz={npz}")
    expected = {
        name: content
        for name, content in whole[0].items()
        if (png == "true" or not name[0].isdigit()) and (npz == "true" or name != "samples.npz")
    }
    assert left == expected


def test_samples_of_another_plan_are_replaced_and_a_line_says_what_differs(trained, tmp_path):
    draw(trained, tmp_path / "a", "num_samples=20", "seed=1")
    done = run("sample", f"ckpt={trained}", f"out_dir={tmp_path}/a", "num_samples=10", "seed=2")
    assert f"{tmp_path}/a: replacing samples that were drawn with other seed" in done.out
    assert left_in(tmp_path / "a") == draw(trained, tmp_path / "b", "num_samples=10", "seed=2")


# -- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 10, -1], ids=["empty", "the head", "all but a byte"])
def test_a_png_that_is_not_whole_is_drawn_again(cut, whole, trained, tmp_path):
    draw(trained, tmp_path, *SCORED)
    path = tmp_path / "000007.png"
    path.write_bytes(path.read_bytes()[:cut])
    (tmp_path / "samples.npz").unlink()  # or its pixels would be there
    assert draw(trained, tmp_path, *SCORED) == whole[0]


def test_a_damaged_array_is_named_deleted_and_written_again(whole, trained, tmp_path):
    draw(trained, tmp_path, *SCORED)
    path = tmp_path / "samples.npz"
    path.write_bytes(path.read_bytes()[:1000])
    done = run("sample", f"ckpt={trained}", f"out_dir={tmp_path}", *SCORED)
    assert done.code == 1 and "samples.npz was damaged and is deleted" in done.errors[0]
    assert draw(trained, tmp_path, *SCORED) == whole[0]


def test_a_png_file_is_whole_where_its_end_is_there(tmp_path, whole):
    path = tmp_path / "x.png"
    for content, expected in ((whole[0]["000000.png"], True), (b"", False), (PNG_END[:-1], False)):
        path.write_bytes(content)
        assert is_whole_png(path) == expected


def test_a_png_file_that_does_not_decode_is_named_and_deleted(tmp_path, whole):
    path = tmp_path / "x.png"
    content = bytearray(whole[0]["000000.png"])
    content[30:60] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png was damaged and is deleted"):
        read_png(path)
    assert not path.exists()


def test_a_damaged_file_of_tensors_is_named_and_deleted(tmp_path):
    parts = Parts(tmp_path)
    parts.write(range(16, 32), {"pixels": torch.arange(16)})
    assert parts.runs() == [range(16, 32)]
    assert parts.row("pixels", 20) == 4
    parts.path(range(16, 32)).write_bytes(b"\1" * 50)
    with pytest.raises(ValueError, match="000016-000032.safetensors was damaged"):
        parts.read(range(16, 32))
    assert parts.runs() == []


# -- one array ------------------------------------------------------------------------------


def test_the_array_written_in_pieces_is_the_one_that_numpy_writes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(50)
    pieces = (pixels[i : i + 7] for i in range(0, 50, 7))
    write_npz(tmp_path / "ours.npz", pixels.shape, pieces, labels)
    np.savez(tmp_path / "theirs.npz", pixels, labels)
    with np.load(tmp_path / "ours.npz") as ours, np.load(tmp_path / "theirs.npz") as theirs:
        assert list(ours) == list(theirs)
        for name in theirs:
            assert np.array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
    assert np.array_equal(open_npz(tmp_path / "ours.npz"), pixels)
    assert isinstance(open_npz(tmp_path / "ours.npz"), np.memmap)  # not in memory


def test_an_array_is_written_from_one_piece_at_a_time(tmp_path):
    alive = []

    class Piece(np.ndarray):
        def __del__(self):
            alive.pop()

    def pieces():
        for _ in range(100):
            piece = np.zeros((1, 8, 8, 3), np.uint8).view(Piece)
            alive.append(None)
            assert len(alive) <= 2  # the one before may still be held by the loop
            yield piece
            del piece

    write_npz(tmp_path / "x.npz", (100, 8, 8, 3), pieces(), np.zeros(100))


# -- several processes ----------------------------------------------------------------------


def test_two_processes_leave_the_same_files_as_one(whole, trained, tmp_path):
    options = [f"ckpt={trained}", f"out_dir={tmp_path}/two", f"runs_dir={trained.parent.parent}"]
    done = run_for_real("sample", *options, *SCORED, "devices=2", cwd=tmp_path)
    assert done.code == 0, done.err
    ours, theirs = left_in(tmp_path / "two"), dict(whole[0])
    figures = [json.loads(left.pop("metrics.json")) for left in (ours, theirs)]
    assert ours == theirs
    (our, their) = (content.pop("protocol") for content in figures)
    assert our == their
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_a_portable_folder_needs_a_reference_to_be_scored_against(trained, tmp_path):
    options = ["num_samples=0", f"export={tmp_path}/pair", f"out_dir={tmp_path}/none"]
    assert run("sample", f"ckpt={trained}", *options).code == 0
    done = run("sample", f"ckpt={tmp_path}/pair", f"out_dir={tmp_path}/scored", *SCORED)
    assert done.code == 1
    assert "evaluation.reference" in done.errors[0] and "is in no run folder" in done.errors[0]
    assert not (tmp_path / "scored").exists()
