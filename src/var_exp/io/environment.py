"""Where a figure was obtained: machine, versions, code, command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "lightning", "torchmetrics", "torch-fidelity", "wandb")


def machine() -> dict[str, Any]:
    """What computes, and with which versions, as plain data."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    parts = [_processor(), f"{_cores()} cores", ", ".join(gpus) or "no GPU"]
    return {
        "machine": ", ".join(parts),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def environment() -> dict[str, Any]:
    """`machine()`, with the command, the time, and the state of the code that runs."""
    commit = _git("rev-parse", "HEAD")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "git_commit": commit[:12] or None,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        **machine(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word for it
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of the tree that this file is in; nothing where there is none."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
