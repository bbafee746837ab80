"""One run at a time in a run folder.

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

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where it is missing.

    A file system without locks is no hindrance.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / NAME, "a+")
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot write in {str(folder)!r} ({error.strerror}); choose another run_dir "
            f"or runs_dir, or ask for permission"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(
                f"run_dir: {str(folder)!r} is in use by {who}; wait for it or stop it, or "
                f"start in a new run folder (run_dir=...)"
            ) from None
        except OSError:  # no locks on this file system
            yield
            return
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}\n"
        )
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
