"""A file is whole or what it was before; reading one never runs what it holds."""

import os

import pytest
import torch

from var_exp.io.files import atomic_write, read_tensors


def test_a_failure_while_writing_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("first")
        assert not path.exists() and unfinished.suffix == ".txt"
    with pytest.raises(RuntimeError), atomic_write(path) as unfinished:
        unfinished.write_text("sec")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["x.txt"]


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_are_read_and_code_is_not_run(mapped, tmp_path):
    torch.save({"a": torch.arange(3), "b": [1, "x"]}, tmp_path / "good.pt")
    content = read_tensors(tmp_path / "good.pt", mapped)
    assert torch.equal(content["a"], torch.arange(3)) and content["b"] == [1, "x"]

    class Smuggled:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Smuggled(), tmp_path / "code.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:200])
    (tmp_path / "empty.pt").touch()
    for name in ("code.pt", "short.pt", "empty.pt"):
        with pytest.raises(ValueError, match="damaged, holds code, or is not"):
            read_tensors(tmp_path / name, mapped)
    with pytest.raises(ValueError, match="no such file"):
        read_tensors(tmp_path / "nothing.pt", mapped)
    assert not (tmp_path / "ran").exists()
