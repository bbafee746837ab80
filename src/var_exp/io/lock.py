"""One run at a time in a folder.

A lock of the operating system on a file: it ends with the process that holds it, however that
ends. Processes that the run starts do not inherit it, so that one of them that lives on for a
moment does not keep the run from going on.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, option: str = "run_dir=...") -> Iterator[None]:
    """Hold a folder, which is made where it is missing.

    A file system without locks is no hindrance.

    Args:
        option: how the folder is named on the command line.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    path, key = folder / NAME, option.partition("=")[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise ValueError(
            f"{key}: cannot write in {str(folder)!r} ({error.strerror}); choose another folder "
            f"({option}), or ask for permission"
        ) from None
    with file:
        if not _lock(file) or not _is_at(file, path):
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(
                f"{key}: {str(folder)!r} is in use by {who}; wait for it or stop it, or choose "
                f"another folder ({option})"
            )
        file.truncate(0)
        now = datetime.now()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%F %T}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # no locks on this file system
        return True
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether a file is still the one at a path: who held it may just have deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
