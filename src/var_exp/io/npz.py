"""Reading .npz files that anyone may have made: whole or refused, and never run.

An .npz is a zip archive of arrays. numpy's own reader stops where an array's header says that it
ends, which may be before the checksum is compared, and takes a whole array into memory. Here all
of a member is read, so that a flipped bit is found, and images can be read one at a time.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

HEADERS = {  # by version; others are for names of fields that Latin-1 lacks
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
DIRECTORY_ENTRY = b"PK\x01\x02"  # how each line of an archive's list of members begins


class NpzError(ValueError):
    """Why a file cannot be read, in words that go on from its name: "is missing"."""


class Header(NamedTuple):
    """What an array is; by_columns: its first index runs fastest, Fortran's order."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype


def names(path: Path) -> set[str]:
    """The names of the arrays in a file.

    Raises:
        NpzError: the file is missing, damaged, or no .npz.
    """
    with _explained(), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            # Opening compares its name in the list, which has no checksum, with that beside it.
            archive.open(member).close()
            # A wrong length of what follows a name would swallow the members listed after it.
            if DIRECTORY_ENTRY in member.extra + member.comment:
                raise NpzError("is damaged: its list of arrays is not whole")
        return {name.removesuffix(".npy") for name in archive.namelist()}


def header(path: Path, name: str) -> Header:
    """The shape and type of an array, without reading it. Raises as `read` does."""
    with _opened(path, name) as (head, _):
        return head


def read(path: Path, name: str) -> np.ndarray:
    """An array, read-only.

    Raises:
        NpzError: the file or the array in it is missing or damaged, or holds pickled objects.
    """
    with _opened(path, name) as (head, stream):
        order: Literal["F", "C"] = "F" if head.by_columns else "C"
        return np.ndarray(head.shape, head.dtype, buffer=stream.read(), order=order)


def write(path: Path | IO[bytes], arrays: Mapping[str, ArrayLike]) -> None:
    """Write the arrays, none of which is called "file" or "allow_pickle"."""
    np.savez(path, **arrays)  # type: ignore[arg-type]  # for that name's sake


def rows(path: Path, name: str) -> Iterator[np.ndarray]:
    """The rows array[0], array[1] ... of an array of at least one dimension, read one by one.

    Raises:
        NpzError: as `read`, where damage may be found only at the last row; or the array is
            stored by columns.
    """
    with _opened(path, name) as (head, stream):
        if head.by_columns:
            raise NpzError(f"stores {name} by columns (write it with numpy.ascontiguousarray)")
        num_rows, *shape = head.shape
        num_bytes = math.prod(shape) * head.dtype.itemsize
        for _ in range(num_rows):
            yield np.ndarray(shape, head.dtype, buffer=stream.read(num_bytes))


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
    """An array's header, and what follows it as a stream of exactly the bytes it asks for."""
    with _explained(), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            head = Header(*HEADERS[np.lib.format.read_magic(stream)](stream))
            if head.dtype.hasobject:
                raise NpzError("holds pickled objects, which are not read")
            expected = math.prod(head.shape) * head.dtype.itemsize
            if member.file_size - stream.tell() != expected:
                raise NpzError(f"is damaged: the size of {name} is not as its header says")
            yield head, stream


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except NpzError:
        raise
    except FileNotFoundError:
        raise NpzError("is missing") from None
    except (IsADirectoryError, PermissionError) as error:
        raise NpzError(f"cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged archive raises anything, from KeyError to zlib.error
        raise NpzError(f"is damaged or no .npz ({type(error).__name__})") from None
