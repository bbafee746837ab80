"""What the README shows is true: its commands run (small), its Python runs, its paths exist."""

import re

import pytest

from helpers.command import run
from helpers.documents import (
    README,
    blocks,
    commands,
    lacks_something,
    run_small,
    runs_of,
    words,
)

KNOWN = ("pip install", "pytest", "python train.py", "python sample.py", "sbatch docs/train.sbatch")


def test_every_command_is_one_that_is_tested_or_a_well_known_tool():
    assert all(command.startswith(KNOWN) for command in commands(README))
    assert "" in runs_of(README, "train") and len(runs_of(README, "train")) > 5
    assert len(runs_of(README, "sample")) >= 2


@pytest.mark.parametrize("command", runs_of(README, "train"))
def test_every_training_command_works(command, workplace):
    arguments = words(command)
    if lacks_something(arguments):
        done = run("train", "--cfg", "job", *arguments)
        assert done.code == 0 and "_target_" in done.out, done.err
        return
    done = run_small(arguments)
    assert done.code == 0, done.err
    if "--cfg" in arguments:
        assert "_target_" in done.out and not (workplace / "samples").exists()
    else:
        assert "what was reached" in done.out
        assert (workplace / "runs" / "latest" / "metrics.json").exists()


@pytest.mark.parametrize("command", runs_of(README, "sample"))
def test_every_sampling_command_works(command, workplace):
    arguments = words(command)
    if lacks_something(arguments):
        done = run("sample", "--cfg", "job", *arguments)
        assert done.code == 0 and "cfg_scale" in done.out, done.err
        return
    done = run("sample", *arguments)
    assert done.code == 0, done.err
    (out,) = [word.partition("=")[2] for word in arguments if word.startswith("out_dir=")]
    assert (workplace / out / "samples.npz").exists()


def test_the_python_runs_from_the_first_block_to_the_last(workplace):
    known = {}
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), known)


def test_the_run_folder_is_as_the_readme_draws_it(trained):
    (tree,) = [block for block in blocks(README, "") if block.startswith("runs/")]
    lines = [re.split(r"\s{2,}", line.strip())[0].split() for line in tree.splitlines()[1:]]
    named = {name.rstrip("/") for line in lines for name in line}
    assert {path.name for path in trained.iterdir()} == named


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 220
