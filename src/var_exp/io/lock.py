"""One run at a time in a folder.

The lock is the operating system's (`flock`, taken by filelock): it ends with the process that
holds it, however that ends. From version 3.30 on, filelock closes it in forked processes, so that
a worker which lives on for a moment does not keep the run from being resumed.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none


@contextlib.contextmanager
def locked(folder: Path, option: str = "run_dir=...") -> Iterator[None]:
    """Hold a folder, which is created if it is missing.

    On a file system without locks nothing is held.

    Args:
        option: how the folder is named on the command line.

    Raises:
        ValueError: another process holds the folder, or its lock file cannot be written.
    """
    path, key = folder / NAME, option.partition("=")[0]
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{key}: {str(folder)!r} is in use by {_holder(path)}; wait for it or stop it, or "
            f"choose another folder ({option})"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise ValueError(
                f"{key}: cannot write {str(path)!r} ({error.strerror}); choose another folder "
                f"({option}), or ask for permission"
            ) from None
    path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except FileNotFoundError:  # it has just let go
        return "another process"
