"""Images in parquet files, read a row group at a time, from a disk or over a network.

The smallest piece of a parquet file that can be read alone is a row group. What the files' footers
say of these, and the column of labels, is read once; then image i is a row of a known group. The
last groups that were read are kept, and the order follows the groups (`blocks.py`), so a process
reads each group about once an epoch: each process, data workers included.

Files are whatever fsspec opens: paths, or hf:// addresses of the Hugging Face hub.

Letters: N images, G row groups, F files.
"""

import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from var_exp.data.encoded import EncodedImages, decode

MAX_GROUP_BYTES = 2**29
NUM_THREADS = 16  # that read footers: over a network each waits for its answer


class RowGroups(NamedTuple):
    """files: F addresses; file, place: (G,) where each group is; starts: (G + 1,) rows before it;
    labels: (N,) of all rows."""

    files: tuple[str, ...]
    file: np.ndarray
    place: np.ndarray
    starts: np.ndarray
    labels: np.ndarray


class ParquetImages(EncodedImages):
    """The rows of parquet files that have the given numbers.

    column:   of the images, structs of bytes and path
    max_kept: row groups that are kept in memory
    """

    def __init__(
        self,
        groups: RowGroups,
        column: str,
        numbers: np.ndarray,
        max_kept: int,
        channels: int,
        skip: bool,
    ):
        super().__init__(groups.labels[numbers], channels, skip)
        self.groups, self.column, self.numbers = groups, column, numbers
        self.group = np.searchsorted(groups.starts, numbers, side="right") - 1  # (N,)
        self.max_kept = max_kept
        self.kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def read(self, number: int) -> Image.Image:
        group = int(self.group[number])
        row = int(self.numbers[number] - self.groups.starts[group])
        return decode_struct(self.rows_of(group)[row].as_py(), self.name_of(number), self.mode)

    def rows_of(self, group: int) -> pa.ChunkedArray:
        rows = self.kept.pop(group, None)
        if rows is None:
            file, place = (int(a[group]) for a in (self.groups.file, self.groups.place))
            with open_parquet(self.groups.files[file]) as opened:
                rows = opened.read_row_group(place, columns=[self.column]).column(0)
        self.kept[group] = rows
        if len(self.kept) > self.max_kept:
            self.kept.popitem(last=False)
        return rows

    def name_of(self, number: int) -> str:
        row = self.numbers[number]
        group = self.group[number]
        first = self.groups.starts[np.searchsorted(self.groups.file, self.groups.file[group])]
        return f"{self.groups.files[self.groups.file[group]]}, row {row - first}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": OrderedDict()}


def decode_struct(image: dict, name: str, mode: str) -> Image.Image:
    """An image as Hugging Face stores it: its bytes, or where none are, a path."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError(f"the image '{name}' is missing: there are neither bytes nor a path")
    held = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    return decode(held, name, mode)


def read_row_groups(files: Sequence[str], label_column: str | None) -> RowGroups:
    """What lies where; labels are 0 without a column of them.

    Raises:
        ValueError: a file is no parquet file, or its row groups are too large to be read one at
            a time.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(lambda file: _read_footer(file, label_column), files))
    counts = [rows for rows, _ in found]
    return RowGroups(
        tuple(files),
        file=np.repeat(np.arange(len(files)), [len(rows) for rows in counts]),
        place=np.concatenate([np.arange(len(rows)) for rows in counts]),
        starts=np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
        labels=np.concatenate([labels for _, labels in found]),
    )


def _read_footer(file: str, label_column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """A file's address -> (rows of each of its groups, labels of its rows)."""
    with open_parquet(file) as opened:
        about = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in about), default=0)
        if largest > MAX_GROUP_BYTES:
            raise ValueError(
                f"'{file}' has row groups of up to {largest / 1e6:.0f} MB, expected at most "
                f"{MAX_GROUP_BYTES / 1e6:.0f} to read one at a time: data.streamed=false, or write "
                "it with a smaller row_group_size"
            )
        rows = np.array([group.num_rows for group in about], dtype=np.int64)
        if label_column is None:
            return rows, np.zeros(rows.sum(), dtype=np.int64)
        return rows, opened.read(columns=[label_column]).column(0).to_numpy()


def open_parquet(file: str) -> pq.ParquetFile:
    """ValueError names a file that is missing, cut short or no parquet file."""
    try:
        system, path = fsspec.url_to_fs(file)
        return pq.ParquetFile(path, filesystem=system, pre_buffer=True)
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read '{file}' as a parquet file ({reason})") from error
