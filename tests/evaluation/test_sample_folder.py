"""A folder of samples is one plan's: what is of another goes, what is of no set stays."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest

from helpers.command import files, run
from helpers.sample_sets import Killed, complete, draw, left_in, make_set, tiny_sampler

KINDS = [{"png": png, "npz": npz} for png, npz in product((True, False), repeat=2)]


@pytest.fixture(scope="module")
def sampler():
    return tiny_sampler()


@pytest.fixture(scope="module")
def expected(sampler, tmp_path_factory):
    """Every file of a set of 5 samples."""
    folder = tmp_path_factory.mktemp("expected")
    complete(make_set(folder, sampler, 5), sampler)
    return files(folder)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed": 1}, "seed"),
        ({"classes": [2, 0]}, "classes"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"weights": 1}, "networks"),
        ({"cfg_scale": 2.0, "top_k": 3}, "cfg_scale, top_k"),
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_samples_of_another_plan_are_replaced_and_a_line_says_what_differs(
    change, differs, kind, sampler, tmp_path
):
    if any(kind.values()):
        complete(make_set(tmp_path, sampler, 12, **kind), sampler)
    else:  # of which nothing but pictures would be left
        samples = make_set(tmp_path, sampler, 12, **kind)
        samples.begin()
        samples.fill(samples.missing()[0], sampler, None)
    other = tiny_sampler(**change)
    said, drawn = complete(make_set(tmp_path, other, 5), other)
    assert said == f"{tmp_path}: replacing samples that were drawn with other {differs}"
    assert drawn == list(range(5))
    complete(make_set(tmp_path / "new", other, 5), other)
    new = files(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    assert files(tmp_path) == new


def test_the_program_prints_the_line(trained, tmp_path):
    draw(trained, tmp_path / "a", "num_samples=20", "seed=1")
    done = run("sample", f"ckpt={trained}", f"out_dir={tmp_path}/a", "num_samples=10", "seed=2")
    lines = [line for line in done.out.splitlines() if "replacing" in line]
    assert lines == [f"{tmp_path}/a: replacing samples that were drawn with other seed"]
    assert left_in(tmp_path / "a") == draw(trained, tmp_path / "b", "num_samples=10", "seed=2")


@pytest.mark.parametrize("content", [b"", b"null", b'{"plan": [1], "num_samples": 5}'])
def test_samples_whose_plan_is_damaged_are_replaced(content, sampler, expected, tmp_path):
    complete(make_set(tmp_path, sampler, 5), sampler)
    (tmp_path / "plan.json").write_bytes(content)
    said, drawn = complete(make_set(tmp_path, sampler, 5), sampler)
    assert said.endswith("drawn in a way that is not recorded") and drawn == list(range(5))
    assert files(tmp_path) == expected


@pytest.mark.parametrize("name", ["000021.png", "samples.npz", "grid.png"])
def test_files_that_were_not_drawn_here_are_refused_and_stay(name, trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    done = run("sample", f"ckpt={trained}", f"out_dir={tmp_path}/out", "num_samples=2")
    (line,) = done.errors
    assert done.code == 1 and f"holds {name}, but no plan.json" in line and "out_dir=..." in line
    assert files(tmp_path / "out") == {name: b"mine"}


def test_the_run_folder_of_a_training_is_refused_and_stays(copied, tmp_path):
    before = files(copied)
    done = run("sample", f"ckpt={copied}", f"out_dir={copied}", "num_samples=2")
    (line,) = done.errors
    assert done.code == 1 and "the run folder of a training" in line
    assert files(copied) == before


@pytest.mark.parametrize("content", [b"", b'{"sample/fid": 1.', b"null", b"\xff"])
def test_damaged_figures_are_named_before_anything_is_drawn(content, trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_bytes(content)
    options = [f"ckpt={trained}", f"out_dir={tmp_path}/out", "num_samples=2"]
    done = run("sample", *options)
    (line,) = done.errors
    assert done.code == 1 and line.endswith(
        f"{tmp_path}/out/metrics.json is damaged; delete it, and the same command measures its own "
        f"figures again"
    )
    assert files(tmp_path / "out") == {"metrics.json": content}
    (tmp_path / "out" / "metrics.json").unlink()
    assert run("sample", *options).code == 0


@pytest.mark.parametrize("then", ["the new plan", "the earlier plan"])
def test_a_replacement_killed_at_any_deletion_ends_as_a_set_of_its_own(
    then, sampler, tmp_path, monkeypatch
):
    other, real = tiny_sampler(seed=1), Path.unlink
    going_on = sampler if then == "the new plan" else other
    complete(make_set(tmp_path / "alone", going_on, 5), going_on)
    for at in range(10_000):
        folder, count, killed = tmp_path / str(at), iter(range(10_000)), False
        complete(make_set(folder, other, 5), other)

        def unlink(path, missing_ok=False, count=count, at=at):
            if next(count) == at:
                raise Killed
            real(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                make_set(folder, sampler, 5).begin()
            except Killed:
                killed = True
        complete(make_set(folder, going_on, 5), going_on)
        assert files(folder) == files(tmp_path / "alone")
        if not killed:
            break
    assert at > 5  # PNG files alone are so many


def test_files_that_are_not_of_the_set_stay(sampler, tmp_path):
    complete(make_set(tmp_path, sampler, 5), sampler)
    figures = {"var/loss": 3.9, "sample/fid_classifier": 1.0}
    figures["protocol"] = {"var": {"seed": 7}, "sample": {"seed": 0}}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    others = {
        "notes.txt": b"mine",
        "7.png": b"x",
        "photo.png": b"y",
        "checkpoints/000001.png": b"z",
    }
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    other = tiny_sampler(seed=1)
    complete(make_set(tmp_path, other, 5), other)
    assert others.items() <= files(tmp_path).items()
    left = json.loads((tmp_path / "metrics.json").read_text())
    assert left == {"var/loss": 3.9, "protocol": {"var": {"seed": 7}}}


def test_what_killed_processes_left_beside_the_files_is_deleted(sampler, expected, tmp_path):
    pictures = (".000003.77.png", ".grid.77.png", ".coarse_to_fine.77.png")
    others = (".plan.77.json", ".samples.77.npz", ".metrics.77.json", ".environment.77.json")
    for name in (*pictures, *others, "unfinished/.000000-000008.77.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"cut")
    complete(make_set(tmp_path, sampler, 5), sampler)
    assert files(tmp_path) == expected


@pytest.mark.parametrize("name", ["notes.txt", "000000-000016.npz", "record.json"])
def test_an_unfinished_folder_of_someone_else_stays(name, sampler, expected, tmp_path):
    theirs = tmp_path / "unfinished" / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"mine")
    if name == "notes.txt":
        complete(make_set(tmp_path, sampler, 5), sampler)
        assert files(tmp_path) == expected | {"unfinished/notes.txt": b"mine"}
    else:
        with pytest.raises(ValueError, match=r"out_dir: .*record\.json' is .*\(out_dir=\.\.\.\)"):
            complete(make_set(tmp_path, sampler, 5), sampler)
        assert files(tmp_path) == {f"unfinished/{name}": b"mine"}
