"""What tests share: one thread, a fixed seed, two tiny networks, and one small finished run."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from helpers.command import TINY, Finished
from helpers.programs import run_forked
from helpers.published import tokenizer_state, transformer_state
from helpers.tiny import tiny_tokenizer, tiny_transformer
from var_exp.data import Digits
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rehearsal of the preflight comes last.

    A backward pass on the meta device starts threads of autograd, and a process that has them
    cannot be forked into others that train, as tests of several processes do.
    """
    items.sort(key=lambda item: item.path.name.startswith("test_preflight"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> VQVAE:
    return tiny_tokenizer()


@pytest.fixture
def transformer() -> VAR:
    return tiny_transformer()


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The embedded images, set up."""
    source = Digits()
    source.setup()
    return source


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """Where `python train.py` ran, small, on the digits, and what it said."""
    place = tmp_path_factory.mktemp("finished")
    done = run_forked("train", *TINY, cwd=place, rendering=True)
    assert done.code == 0, done.err
    return place, done


@pytest.fixture(scope="session")
def trained(finished: tuple[Path, Finished]) -> Path:
    """The run folder of `finished`; to be read, not written."""
    return (finished[0] / "runs" / "latest").resolve()


@pytest.fixture(scope="session")
def classifier(trained: Path) -> Path:
    """A file of the digits' feature network, which takes long to train."""
    return trained / "evaluation" / "classifier.pt"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A run folder like `trained` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "copied", symlinks=True))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files under the names of the published model var_d16, with tiny networks in them."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(transformer_state(), folder / "var_d16.pth")
    torch.save(tokenizer_state(), folder / "vae_ch160v4096z32.pth")
    return folder


@pytest.fixture
def workplace(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the default job has just run, as the documentation has it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("var_exp.evaluation.networks.classifier.NUM_STEPS", 3)
    return tmp_path
