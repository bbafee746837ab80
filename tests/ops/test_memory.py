"""A process that keeps its memory does not ask the system for it again."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.command import ROOT
from var_exp.ops import memory as allocation

PROGRAM = """
import resource, sys, torch
from var_exp.ops import memory as allocation

held = [getattr(allocation, name)() for name in sys.argv[1:]]
counts = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)  # 64 MB
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(all(held), min(counts))
"""


def faults_with(*calls: str, **environment: str) -> int:
    """The fewest pages that the system fills for a tensor of 64 MB, after those calls."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    variables |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-c", PROGRAM, *calls]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    held, faults = done.stdout.split()
    if held == "False" and not environment:
        pytest.skip("a C library that cannot be told")
    return int(faults)


def test_memory_that_was_kept_is_used_again():
    usual, kept = faults_with(), faults_with("keep_memory")
    if usual < 1000:
        pytest.skip("a system that fills large pages")
    assert kept < usual / 100


@pytest.mark.parametrize(
    "given",
    [
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"},
    ],
    ids=str,
)
def test_what_the_environment_says_of_memory_stays(given):
    assert faults_with("keep_memory", **given) > faults_with() / 2


def test_a_library_that_refuses_one_parameter_is_left_as_it_is(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *given: asked.append(given) or 0)
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("glibc", "2.28"))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: library)
    assert not allocation.set_parameters(allocation.KEEPING)
    assert asked == [(allocation.MMAP_THRESHOLD, allocation.KEPT)]
