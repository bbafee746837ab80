"""What the README shows is true: its commands run (small), its Python runs, its paths exist."""

import re
import shlex
from pathlib import Path

import pytest

from helpers.command import QUICK, ROOT, Finished, run

README = (ROOT / "README.md").read_text()
# A single batch of each stage; no command of the README may fail however small it is.
SMALL = [*QUICK, *(f"model.{stage}.num_batches=1" for stage in ("tokenizer", "var"))]
SMALL_OF = {
    "data=shapes": ["data.num_train=96", "data.num_val=24"],
    "-m": ["stages=[tokenizer]"],
}
# What is not here: a network, a GPU, a folder of images. Such commands are only composed.
ABSENT = ("mnist", "cifar10", "imagenet", "gpu", "DIR", "official")
KNOWN = ("pip install", "pytest", "python train.py", "python sample.py", "sbatch docs/train.sbatch")


def blocks(language: str) -> list[str]:
    """The code blocks of a language; those without one have the language ''."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def commands() -> list[str]:
    """Every command of the bash blocks, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in shlex.join(words(line)).split(" '&&' ")]
    return [part for part in parts if part]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def ours(program: str) -> list[str]:
    found = [command for command in commands() if command.startswith(f"python {program}.py")]
    return [command.removeprefix(f"python {program}.py").strip() for command in found]


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch) -> Path:
    """A folder in which the default job has just run, as the README has it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 3)
    return tmp_path


def run_small(command: str) -> Finished:
    arguments = words(command)
    chosen = [option for name in arguments for option in SMALL_OF.get(name, [])]
    return run("train", *arguments, *SMALL, *chosen)


def test_every_command_is_one_that_is_tested_or_a_well_known_tool():
    assert all(command.startswith(KNOWN) for command in commands())
    assert "" in ours("train") and len(ours("train")) > 5 and len(ours("sample")) >= 2


def lacks_something(arguments: list[str]) -> bool:
    return any(absent in argument for argument in arguments for absent in ABSENT)


@pytest.mark.parametrize("command", ours("train"))
def test_every_training_command_works(command, workplace):
    arguments = words(command)
    if lacks_something(arguments):
        done = run("train", "--cfg", "job", *arguments)
        assert done.code == 0 and "_target_" in done.out, done.err
        return
    done = run_small(command)
    assert done.code == 0, done.err
    if "--cfg" in arguments:
        assert "_target_" in done.out and not (workplace / "samples").exists()
    else:
        assert "what was reached" in done.out
        assert (workplace / "runs" / "latest" / "metrics.json").exists()


@pytest.mark.parametrize("command", ours("sample"))
def test_every_sampling_command_works(command, workplace):
    if lacks_something(words(command)):
        done = run("sample", "--cfg", "job", *words(command))
        assert done.code == 0 and "cfg_scale" in done.out, done.err
        return
    done = run("sample", *words(command))
    assert done.code == 0, done.err
    (out,) = [word.partition("=")[2] for word in words(command) if word.startswith("out_dir=")]
    assert (workplace / out / "samples.npz").exists()


def test_the_python_runs_from_the_first_block_to_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {}
    for code in blocks("python"):
        if ".pth" in code:  # needs the published files: what it calls must be there
            called = re.findall(r"\bvar_exp\.(\w+)\(", code)
            assert called and all(hasattr(known["var_exp"], name) for name in called)
            compile(code, "README.md", "exec")
        else:
            exec(compile(code, "README.md", "exec"), known)


def paths_in_tree(tree: str) -> list[str]:
    """The paths of an annotated tree: names before two blanks, each below the last less indented.

    Names that share a line share their parent.
    """
    found, parents = [], {}
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        indent = len(line) - len(line.lstrip())
        above = "".join(parents[i] for i in sorted(parents) if i < indent)
        parents = {i: name for i, name in parents.items() if i < indent}
        parents[indent] = names[-1]
        found += [above + name for name in names]
    return found


def test_the_tree_names_only_what_exists_and_all_that_matters():
    (tree,) = [block for block in blocks("") if block.startswith("train.py")]
    named = paths_in_tree(tree)
    assert {"train.py", "conf/train.yaml", "src/var_exp/tokenizer/"} <= set(named)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in named)
    for folder in ("conf", "src/var_exp"):
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and path.name != "__pycache__":
                assert f"{folder}/{path.name}/" in named


def test_the_run_folder_is_as_the_readme_draws_it(trained):
    (tree,) = [block for block in blocks("") if block.startswith("runs/")]
    top = tree.splitlines()[0].split()[0]
    named = {path.removeprefix(top).rstrip("/") for path in paths_in_tree(tree)} - {""}
    assert {path.name for path in trained.iterdir()} == named


def test_every_link_into_the_repository_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    inside = [link for link in links if not link.startswith("http")]
    assert inside
    assert not [link for link in inside if not (ROOT / link).exists()]


def test_paths_in_the_text_exist():
    quoted = re.findall(r"`((?:src|conf|tests|docs)/[\w/.]+)`", README)
    assert quoted
    assert not [path for path in quoted if not (ROOT / path).exists()]
