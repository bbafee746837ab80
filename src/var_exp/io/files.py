"""Files that are whole or not there, that verify themselves, and are read without running them."""

import hashlib
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest around it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def check_writable(folder: Path, key: str) -> None:
    """Raise ValueError where a folder, named by a key, cannot be made or written in."""
    place = nearest(folder)
    if not place.is_dir():
        raise ValueError(f"{key}: expected a folder, {str(place)!r} is a file")
    is_storage = shutil.disk_usage(place).total > 0  # /proc is none, also where one may write
    if not is_storage or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{key}: no permission to write in {str(place)!r}, where {str(folder)!r} would be; "
            f"choose another folder, or ask for permission"
        )


@contextmanager
def atomic_write(path: str | os.PathLike, keep: str | os.PathLike | None = None) -> Iterator[Path]:
    """A path beside `path` to write to; it takes its place once the block has ended well.

    Whoever is killed or fails within the block leaves what stood at `path` as it was. The
    process number is in the name, so that two processes do not write to one file.

    Args:
        keep: where what stood at `path` goes. Both steps are renames: a kill between them leaves
            nothing at `path`, and all at `keep`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- seals ----------------------------------------------------------------------------------

CHECKSUM = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM) + hashlib.sha256().digest_size * 2


def write_checksum(path: str | os.PathLike) -> None:
    """Put the SHA-256 of a zip file, as `torch.save` writes it, into the comment at its end.

    So the file verifies itself, whole and in one piece, and stays what it was for other readers.
    """
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"\0\0", "a zip file with a comment"
        file.seek(-2, os.SEEK_END)
        file.write(CHECKSUM_LENGTH.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(CHECKSUM + digest.encode())


def verify_checksum(path: str | os.PathLike) -> None:
    """Raise ValueError unless the file is there, and to the bit what was sealed."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - CHECKSUM_LENGTH))
            written = file.read()
            if not written.startswith(CHECKSUM):
                raise ValueError("damaged: the file is not whole")
            file.seek(0)
            digest, left = hashlib.sha256(), size - CHECKSUM_LENGTH
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    if written != CHECKSUM + digest.hexdigest().encode():
        raise ValueError("damaged: its content is not what was written")


# -- reading --------------------------------------------------------------------------------


def read_tensors(path: str | os.PathLike, mapped: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU: plain data and tensors only.

    Args:
        mapped: read tensors from the disk when they are used, where the file's form allows it;
            for files that nobody writes to meanwhile.

    Raises:
        ValueError: the file is missing, damaged, or holds code.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about the pickle protocol
            mmap = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except Exception as error:  # a damaged pickle raises anything, from KeyError to struct.error
        # Torch's own message explains how to run the code in the file all the same.
        code = [line for line in str(error).splitlines() if "GLOBAL" in line]
        reason = code[0].strip() if code else type(error).__name__
        raise ValueError(f"damaged, holds code, or is not a checkpoint ({reason})") from None


def differences(theirs: Any, ours: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: (dotted name, their value, our value)."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in theirs | ours:
            yield from differences(theirs.get(key), ours.get(key), f"{name}.{key}")
    elif theirs != ours:
        yield name, theirs, ours
