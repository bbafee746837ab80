"""The folders that a run writes to, which need not exist yet."""

import os
import shutil
from pathlib import Path

KEPT = 3  # checkpoints of a stage: last, previous, best; one more while it is written


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest around it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(nearest(folder)).free


def checkpoints_bytes(sizes: list[int]) -> int:
    """Of all checkpoints that are on the disk at once, at most; sizes of one of each stage."""
    return KEPT * sum(sizes) + max(sizes, default=0)


def check_writable(folder: Path) -> None:
    """Raise ValueError where a folder cannot be made or written in."""
    place = nearest(folder)
    if not place.is_dir():
        raise ValueError(
            f"run_dir: {str(place)!r} is a file, expected a folder; choose another run_dir"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"run_dir: no permission to write in {str(place)!r}, where {str(folder)!r} would be; "
            f"choose another run_dir or runs_dir, or ask for permission"
        )
