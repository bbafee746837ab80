"""Files that are whole or not there, and that are read without running what they hold."""

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes its place once the block has ended well.

    Whoever is killed or fails within the block leaves what stood at `path` as it was. The
    process number is in the name, so that two processes do not write to one file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
