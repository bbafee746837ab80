"""One process holds a folder, until it ends in whatever way."""

import os
import subprocess
import sys

import pytest

from helpers.command import ROOT
from var_exp.io.lock import locked

HOLDER = """
import multiprocessing, pathlib, subprocess, sys, time
from var_exp.io.lock import locked

with locked(pathlib.Path(sys.argv[1])):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    program = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(worker.pid, program.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process with a forked worker and a program of its own that holds `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )
    children = [int(pid) for pid in process.stdout.readline().split()]
    yield process, children
    process.kill()
    process.wait()
    for pid in children:
        os.kill(pid, 9)


def test_a_folder_that_is_in_use_is_refused_and_free_at_once_when_its_holder_is_killed(
    holder, tmp_path
):
    process, children = holder
    refused = (
        rf"^out_dir: '{tmp_path}/run' is in use by process {process.pid} on .* since .*; "
        r"wait for it or stop it, or choose another folder \(out_dir=\.\.\.\)$"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=refused), locked(tmp_path / "run", "out_dir=..."):
            pytest.fail("two processes hold one folder")
    process.kill()
    process.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on")
    for pid in children:
        os.kill(pid, 0)  # they are still there
    assert not list((tmp_path / "run").iterdir())


def test_an_error_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_what_a_lock_that_is_a_link_points_to_stays_as_it_is(tmp_path):
    target = tmp_path / "letter.txt"
    target.write_text("dear all")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"cannot write '.*\.lock' \(.*link"), locked(tmp_path):
        pytest.fail("it was held")
    assert target.read_text() == "dear all" and (tmp_path / ".lock").is_symlink()


@pytest.mark.parametrize("folder", ["/proc/run", "file/run"])
def test_a_folder_that_cannot_be_written_is_refused_by_its_option(folder, tmp_path):
    (tmp_path / "file").touch()
    refused = r"^run_dir: cannot write .*; choose another folder \(run_dir=\.\.\.\), or ask for"
    with pytest.raises(ValueError, match=refused), locked(tmp_path / folder):
        pytest.fail("it was held")


def test_a_file_system_without_locks_is_no_hindrance(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())
