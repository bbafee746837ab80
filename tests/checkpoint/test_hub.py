"""A published model is found by its name, and fetched where its files are missing, whole."""

import inspect
import shutil
import sys
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import pytest

from helpers.command import files, run
from var_exp.checkpoint.official.hub import MODELS, TOKENIZER, find_official

FILES = {"var_d16.pth", TOKENIZER}
DOWNLOAD = inspect.signature(hub.hf_hub_download)


@pytest.fixture
def fetched(published: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The library fetches from `published`; the names of what it fetched."""
    names = []

    def metadata(url: str, timeout: float) -> None:
        assert url.startswith("https://") and "FoundationVision/var" in url and timeout <= 10

    def download(*args, **kwargs) -> str:
        given = DOWNLOAD.bind(*args, **kwargs).arguments
        assert given["repo_id"] == "FoundationVision/var"
        target = Path(given["local_dir"]) / given["filename"]
        target.parent.mkdir(parents=True)
        shutil.copy(published / given["filename"], target)
        names.append(given["filename"])
        return str(target)

    monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return names


def refusal(name: str, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        find_official(name, folder)
    message = str(error.value)
    assert message.startswith("official: ") and "\n" not in message and len(message) < 900
    return message


# -- where the files are ------------------------------------------------------------------


def test_files_that_are_there_are_taken_without_the_library(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find_official("var_d16", published) == (
        published / "var_d16.pth",
        published / TOKENIZER,
    )


def test_what_is_missing_is_fetched_once_and_nothing_else_is_left(fetched, published, tmp_path):
    folder = tmp_path / "deep" / "official"
    for _ in range(2):
        found = find_official("var_d16", folder)
    assert set(fetched) == FILES and len(fetched) == 2
    assert all(path.is_file() for path in found)
    assert files(folder) == files(published)
    (folder / TOKENIZER).unlink()
    find_official("var_d16", folder)
    assert fetched[2:] == [TOKENIZER]


def test_an_unknown_name_gets_the_list_of_those_that_exist(tmp_path):
    message = refusal("var_d18", tmp_path)
    assert "'var_d18'" in message and all(name in message for name in MODELS)


# -- where they cannot be fetched ---------------------------------------------------------


def test_without_the_library_the_files_and_the_extra_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refusal("var_d20", tmp_path / "official")
    assert f"'{tmp_path}/official/var_d20.pth'" in message and TOKENIZER in message
    assert "FoundationVision/var" in message and "pip install 'var-exp[hub]'" in message
    assert not (tmp_path / "official").exists()


def test_without_a_network_one_question_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "hf_hub_download", None)  # would ask again and again
    message = refusal("var_d16", tmp_path / "official")
    assert f"'{tmp_path}/official/var_d16.pth'" in message and TOKENIZER in message
    assert "Offline" in message
    assert not (tmp_path / "official").exists()


@pytest.mark.parametrize(
    "error", [OSError("no space left"), RuntimeError("two\nlines"), KeyError("x"), TypeError()]
)
def test_a_download_that_breaks_off_leaves_no_half_file(error, fetched, tmp_path, monkeypatch):
    def half(repo_id, filename, local_dir, **others):
        (Path(local_dir) / "deep").mkdir(parents=True)
        (Path(local_dir) / filename).write_bytes(b"half")
        raise error

    whole = hub.hf_hub_download
    monkeypatch.setattr(hub, "hf_hub_download", half)
    message = refusal("var_d16", tmp_path)
    assert f"'{tmp_path}/var_d16.pth'" in message and type(error).__name__ in message
    assert not files(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", whole)
    assert all(path.is_file() for path in find_official("var_d16", tmp_path))


def test_only_what_is_still_missing_is_named(fetched, tmp_path, monkeypatch):
    whole = hub.hf_hub_download

    def transformers_only(repo_id, filename, **others):
        if filename == TOKENIZER:
            raise ConnectionError("gone")
        return whole(repo_id, filename, **others)

    monkeypatch.setattr(hub, "hf_hub_download", transformers_only)
    message = refusal("var_d16", tmp_path)
    assert "gone" in message and TOKENIZER in message and "var_d16.pth" not in message
    assert set(files(tmp_path)) == {"var_d16.pth"}


def test_what_a_download_could_go_on_from_is_kept(fetched, tmp_path, monkeypatch):
    def half(repo_id, filename, local_dir, **others):
        Path(local_dir).mkdir(parents=True)
        (Path(local_dir) / "abc.incomplete").write_bytes(b"half")
        raise ConnectionError

    monkeypatch.setattr(hub, "hf_hub_download", half)
    refusal("var_d16", tmp_path)
    (left,) = files(tmp_path)
    assert left.endswith(".incomplete")


# -- the program --------------------------------------------------------------------------


def test_the_program_fetches_a_model_by_its_name_and_draws(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["official=var_d16", "num_samples=4", "classes=[9,0]"]
    done = run("sample", *options, "out_dir=first")
    assert done.code == 0, done.err
    assert set(fetched) == FILES and "official/var_d16.pth" in done.out
    again = run("sample", *options, "out_dir=again", f"official_dir={tmp_path}/official")
    assert again.code == 0 and len(fetched) == 2
    with np.load("first/samples.npz") as first, np.load("again/samples.npz") as second:
        assert first["arr_0"].shape == (4, 80, 80, 3) and first["arr_1"].tolist() == [9, 0, 9, 0]
        assert np.array_equal(first["arr_0"], second["arr_0"])
