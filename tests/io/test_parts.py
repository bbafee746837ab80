"""Resumable work in whole files: what is ours, what is whole, and what goes on."""

import operator
import random
import re

import pytest

from helpers.command import files
from helpers.damage import DAMAGES, spoil
from var_exp.io.parts import Parts, in_processes

NAMES = [f"{i}.bin" for i in range(4)]


def make_parts(folder, **work):
    return Parts(folder, "record.json", {"of": "a"} | work, re.compile(r"\d+\.bin"), "x", "move it")


def write(parts, name):
    parts.write(name, lambda path: path.write_bytes(name.encode() * 1000))


def complete(parts):
    """Do the work; what was written, and what was told."""
    told = []
    parts.begin()
    missing = parts.missing(NAMES, told.append)
    for name in missing:
        write(parts, name)
    parts.finish(NAMES)
    return missing, told


@pytest.fixture
def whole(tmp_path):
    complete(make_parts(tmp_path / "whole"))
    return files(tmp_path / "whole")


@pytest.mark.parametrize("stopped_after", range(len(NAMES) + 1))
def test_work_that_was_stopped_goes_on_with_the_parts_that_are_missing(
    stopped_after, whole, tmp_path
):
    parts = make_parts(tmp_path / "out")
    parts.begin()
    for name in NAMES[:stopped_after]:
        write(parts, name)
    assert complete(make_parts(tmp_path / "out")) == (NAMES[stopped_after:], [])
    assert files(tmp_path / "out") == whole and complete(parts) == ([], [])


def test_a_write_that_fails_leaves_what_stood_there(whole, tmp_path):
    parts = make_parts(tmp_path / "whole")

    def fill(path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"x: '.*0\.bin' cannot be written \(No space left .*same"):
        parts.write("0.bin", fill)
    assert files(parts.folder) == whole


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("damage", [*DAMAGES, "empty", "doubled"])
def test_a_damaged_part_is_told_by_name_and_made_again(damage, finished, whole, tmp_path):
    parts = make_parts(tmp_path / "out")
    parts.begin()
    for name in NAMES:
        write(parts, name)
    if finished:
        parts.finish(NAMES)
    spoil(parts.folder / "2.bin", random.Random(0), (damage,))
    missing, (line,) = complete(make_parts(parts.folder))
    assert missing == ["2.bin"] and "2.bin' is damaged" in line
    assert files(parts.folder) == whole


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '{"parts": []}', '{"parts": {"a": 1}}'])
def test_a_damaged_record_is_refused_by_name(content, whole, tmp_path):
    parts = make_parts(tmp_path / "whole")
    (parts.folder / "record.json").write_text(content)
    for use in (parts.begin, parts.read_record):
        with pytest.raises(
            ValueError, match=r"^x: '.*record\.json' is (damaged|not a rec).*; move it$"
        ):
            use()


def test_files_without_a_record_are_a_strangers_and_stay(whole, tmp_path):
    parts = make_parts(tmp_path / "whole")
    (parts.folder / "record.json").unlink()
    left = files(parts.folder)
    with pytest.raises(ValueError, match=r"record\.json' is missing, so it is not known whose 0"):
        parts.begin()
    parts.remove()
    assert files(parts.folder) == left


def test_only_what_is_ours_is_deleted(whole, tmp_path):
    parts = make_parts(tmp_path / "whole")
    others = {"notes.txt": b"a", ".4.bin.77.txt": b"b", ".x.sha256": b"c", "a/0.bin": b"d"}
    ours = (".3.77.bin", ".record.77.json", "..3.bin.77.sha256")
    (parts.folder / "a").mkdir()
    for name, content in {**others, **dict.fromkeys(ours, b"cut")}.items():
        (parts.folder / name).write_bytes(content)
    assert complete(parts) == ([], [])
    assert files(parts.folder) == whole | others
    parts.remove()
    assert files(parts.folder) == others
    complete(make_parts(tmp_path / "alone"))
    make_parts(tmp_path / "alone").remove()
    assert not (tmp_path / "alone").exists()


def test_more_parts_add_to_those_that_are_there(whole, tmp_path):
    parts = make_parts(tmp_path / "whole")
    parts.begin()
    write(parts, "7.bin")
    parts.finish(["7.bin"])
    assert sorted(parts.read_record()["parts"]) == [*NAMES, "7.bin"]
    assert complete(parts) == ([], [])


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_jobs_and_an_error_ends_all(workers):
    jobs = [(8, 2), (2, 2), (6, 2)]
    assert in_processes(operator.floordiv, jobs, workers, "job") == [4, 1, 3]
    with pytest.raises(ZeroDivisionError):
        in_processes(operator.floordiv, [(8, 1), (3, 0)], workers, "job")
