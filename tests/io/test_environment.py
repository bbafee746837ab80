"""Where a figure was obtained: it can be written down, and it is true."""

import json
import platform
import sys

import torch

from var_exp.io import environment as room
from var_exp.io.environment import environment, machine


def test_it_is_plain_data_that_names_machine_versions_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "data=shapes", "name=a b"])
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "train.py data=shapes 'name=a b'"
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] in torch.__version__
    assert "cores" in found["machine"]


def test_libraries_that_are_missing_and_trees_without_git_are_no_mistake(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "LIBRARIES", ("torch", "no-such-library"))
    assert list(machine()["versions"]) == ["torch"]
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    found = environment()
    assert found["git_commit"] is None and found["git_dirty"] is False
