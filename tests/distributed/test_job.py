"""`python sample.py` in processes of its own: killed, told to stop, several at once."""

import json
import os
import signal
import time

import numpy as np
import pytest

from helpers.command import run
from helpers.programs import Forked, children
from helpers.sample_sets import draw, left_in

# In 13 batches, which two processes cannot share evenly, the last of them smaller.
SCORED = ["evaluate=true", "num_samples=200", "batch_size=16"]
SCORED += ["evaluation.num_samples_per_scale=20"]
TWO = [*SCORED, "devices=2"]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """What one process leaves of a scored set that nothing stops."""
    return draw(trained, tmp_path_factory.mktemp("whole"), *SCORED)


@pytest.fixture
def start(trained, tmp_path):
    """Start sample.py on `out`, in a process; it is ended with the test."""
    started = []

    def begin(*options):
        folders = [f"ckpt={trained}", f"out_dir={tmp_path}/out", f"runs_dir={tmp_path}/runs"]
        started.append(Forked("sample.py", *folders, *options, cwd=tmp_path))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.end()


def wait_for(process, folder, pattern):
    """Until a file is there."""
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.read()
        time.sleep(0.001)


def end(process):
    """The exit code, and what was said."""
    done = process.end(timeout=300)
    return done.code, done.err


def test_a_set_whose_process_is_killed_ends_as_an_uninterrupted_one(
    whole, start, trained, tmp_path
):
    process = start(*SCORED)
    wait_for(process, tmp_path / "out", "unfinished/[0-9]*")
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert "metrics.json" not in left_in(tmp_path / "out")
    assert draw(trained, tmp_path / "out", *SCORED) == whole


def test_a_folder_is_one_processs_until_it_is_killed(whole, start, trained, tmp_path):
    process = start(*SCORED)
    wait_for(process, tmp_path / "out", "000003.png")
    process.send_signal(signal.SIGSTOP)
    refused = run("sample", f"ckpt={trained}", f"out_dir={tmp_path}/out", "seed=1")
    (line,) = refused.err.splitlines()
    assert f"in use by process {process.pid}" in line and "(out_dir=...)" in line
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert draw(trained, tmp_path / "out", *SCORED) == whole


def test_a_set_whose_process_is_told_to_stop_says_that_it_goes_on(whole, start, trained, tmp_path):
    process = start(*SCORED)
    wait_for(process, tmp_path / "out", "000003.png")
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    assert code == 85 and "stopped by SIGTERM; the same command goes on" in said
    assert draw(trained, tmp_path / "out", *SCORED) == whole


@pytest.mark.parametrize("told", [pytest.param("the first", marks=pytest.mark.slow), "the other"])
def test_two_processes_of_which_one_is_told_to_stop_end_with_85_and_go_on(
    told, whole, start, tmp_path
):
    process = start(*TWO)
    wait_for(process, tmp_path / "out", "000003.png")
    (child,) = children(process.pid, "sample.py")
    os.kill({"the first": process.pid, "the other": child}[told], signal.SIGTERM)
    code, said = end(process)
    assert code == 85 and "stopped by SIGTERM; the same command goes on" in said, said
    assert "Traceback" not in said and "metrics.json" not in left_in(tmp_path / "out")
    code, said = end(start(*TWO))
    assert code == 0, said
    assert_same(left_in(tmp_path / "out"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["plan.json", "000021.png", "unfinished/[0-9]*"])
def test_a_set_of_two_processes_whose_first_is_killed_is_finished_by_two(
    pattern, whole, start, tmp_path
):
    process = start(*TWO)
    wait_for(process, tmp_path / "out", pattern)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    code, said = end(start(*TWO))
    assert code == 0, said
    assert_same(left_in(tmp_path / "out"), whole)


def assert_same(ours, theirs):
    """Byte for byte, but for figures, whose last digits may tell of the number of processes."""
    ours, theirs = dict(ours), dict(theirs)
    figures = [json.loads(left.pop("metrics.json")) for left in (ours, theirs)]
    assert ours == theirs
    protocols = [content.pop("protocol") for content in figures]
    assert protocols[0] == protocols[1]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_two_processes_leave_the_files_of_one_and_references_for_others(
    whole, start, trained, tmp_path
):
    code, said = end(start(*TWO))
    assert code == 0, said
    assert_same(left_in(tmp_path / "out"), whole)
    kept = sorted((tmp_path / "runs" / "references").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2  # training and held-out images
    done = draw(trained, tmp_path / "one", *SCORED, f"runs_dir={tmp_path}/runs")
    assert_same(done, whole)
    assert sorted((tmp_path / "runs" / "references").iterdir()) == kept
    assert [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.slow
def test_damage_that_the_second_process_finds_ends_both_and_the_same_command_mends_it(
    whole, start, trained, tmp_path
):
    draw(trained, tmp_path / "out", "num_samples=200")
    path = tmp_path / "out" / "000020.png"
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)
    code, said = end(start(*SCORED[:-1], "devices=2", "evaluation.num_samples_per_scale=0"))
    assert code == 1 and "Traceback" not in said
    assert f"error: {path} was damaged and is deleted" in said
    code, said = end(start(*TWO))
    assert code == 0, said
    assert_same(left_in(tmp_path / "out"), whole)


# -- without a run folder around the networks ------------------------------------------------


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """A portable folder, in a folder that sample.py has drawn into."""
    folder = tmp_path_factory.mktemp("drawn")
    draw(trained, folder, f"export={folder}/pair", "num_samples=2")
    return folder / "pair"


@pytest.fixture
def reference(digits, tmp_path):
    """Real images in a file."""
    images = [digits.val_transform(digits.train[i][0]) for i in range(60)]
    pixels = ((np.stack(images) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "real.npz", pixels)
    return tmp_path / "real.npz"


def test_a_portable_folder_is_scored_against_images_in_a_file(pair, trained, reference, tmp_path):
    network = "evaluation.network._target_=helpers.sample_sets.means"
    options = [network, f"evaluation.reference={reference}", *SCORED]
    done = run("sample", f"ckpt={pair}", f"out_dir={tmp_path}/out", *options)
    assert done.code == 0 and "fid_means" in done.out, done.err
    ours = left_in(tmp_path / "out")
    theirs = draw(trained, tmp_path / "run", *options, f"runs_dir={tmp_path}")
    assert ours.keys() == theirs.keys()
    ours, theirs = (json.loads(left["metrics.json"]) for left in (ours, theirs))
    assert {"sample/fid_means", "sample/recall_means", "sample/fid_means_scale_1"} < set(ours)
    for key in set(ours) - {"protocol"}:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
    assert ours["protocol"]["sample"]["reference"]["what"] == "real.npz"


def test_the_classifier_needs_the_images_of_a_run(pair, reference, tmp_path):
    options = [f"evaluation.reference={reference}", f"out_dir={tmp_path}/out", *SCORED]
    done = run("sample", f"ckpt={pair}", *options)
    (line,) = done.err.splitlines()
    assert done.code == 1 and "classifier" in line and "evaluation=inception" in line
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path) == ["real.npz"]
