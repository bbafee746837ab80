"""Images in tar shards, as the `webdataset` library has them, read at random by an index.

A few large files are what the file systems of clusters are good at; a million small ones are not.
The index (`shard_index.py`) says where in its shard each image lies, so the set is map-style:
batch b needs nothing of the batches before it, and a run that goes on reads nothing twice. What
is read next is near what was read last, because the order follows the shards (`blocks.py`).

`python -m var_exp.data.pack FOLDER DIR` makes such a folder, or the index of one that is there.
"""

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from var_exp.configurable import checked
from var_exp.data.encoded import EncodedImages, EncodedSource, decode
from var_exp.data.shards.index import ShardIndex, find_shards, read_index
from var_exp.data.shuffle import block_order

MAX_OPEN = 128  # files of a process; many systems allow 1,024


class Shards(EncodedSource):
    """Images of a folder of tar shards with an index.

    root:    the folder
    shuffle_buffer: images that are shuffled with each other at a time, over all ranks; a set that
             is not larger is shuffled as a whole
    num_streams: shards that are read side by side, over all ranks; with 1, 2, 4 ... num_streams
             ranks, each reads shards of its own
    options: those of `EncodedSource`
    """

    root: str
    train: "ShardImages"

    @checked
    def __init__(
        self,
        root: str | None,
        name: str = "shards",
        shuffle_buffer: PositiveInt = 65536,
        num_streams: PositiveInt = 64,
        **options,
    ):
        super().__init__(name, **options)
        self.root = root  # type: ignore[assignment]  # `prepare` refuses None
        self.shuffle_buffer, self.num_streams = shuffle_buffer, num_streams

    def prepare(self) -> None:
        if self.root is None or not Path(self.root).is_dir():
            raise ValueError(
                f"{self.name}: {self.root!r} is not a folder, expected one that holds tar shards: "
                "set data.root=DIR"
            )
        if not find_shards(Path(self.root)):
            raise ValueError(
                f"{self.name}: no *.tar under '{self.root}': python -m var_exp.data.pack FOLDER "
                f"{self.root} packs a folder of images (data.root=DIR)"
            )

    def load(self) -> tuple["ShardImages", "ShardImages"]:
        self.prepare()
        index = read_index(Path(self.root))
        self.class_names = index.class_names
        self.check_classes(self.root)
        train, val, rest = (index.part(part) for part in ("train", "val", ""))
        if len(rest) and (len(train) or len(val)):
            raise ValueError(
                f"{self.name}: some shards under '{self.root}' have train or val in their names "
                f"and some have neither ({index.shards[index.rows['shard'][rest[0]]]}), expected "
                "all or none (data.root=DIR)"
            )
        train = rest if len(rest) else train
        if not len(train):
            raise ValueError(
                f"{self.name}: the shards under '{self.root}' hold {len(val)} images to validate "
                "on and none to train on (data.root=DIR)"
            )
        if not len(val):
            parts = self.set_aside(index.rows["label"][train], self.root)
            train, val = (train[numbers] for numbers in parts)
        return (
            ShardImages(self.root, index, train, self.channels, self.skips),
            ShardImages(self.root, index, val, self.channels, self.skips),
        )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return block_order(self.train.shard, self.shuffle_buffer, self.num_streams, seed, epoch)


class ShardImages(EncodedImages):
    """The images of an index that have the given numbers."""

    def __init__(
        self, root: str, index: ShardIndex, numbers: np.ndarray, channels: int, skip: bool
    ):
        rows = {name: column[numbers] for name, column in index.rows.items()}
        super().__init__(rows["label"], channels, skip)
        self.shard, self.offset, self.size = rows["shard"], rows["offset"], rows["size"]
        self.checksum = rows["checksum"]
        self.files = OpenFiles([os.path.join(root, shard) for shard in index.shards])

    def read(self, number: int) -> Image.Image:
        shard, offset, size = (int(c[number]) for c in (self.shard, self.offset, self.size))
        data = self.files.read(shard, offset, size)
        if zlib.crc32(data) != self.checksum[number]:
            raise ValueError(
                f"the image '{self.name_of(number)}' is not the one that was indexed: its shard is "
                "damaged, or was changed since (copy it again; or data.on_bad_image=skip)"
            )
        return decode(io.BytesIO(data), self.name_of(number), self.mode)

    def name_of(self, number: int) -> str:
        """shard/key.jpg, by the header before the image, of which 100 bytes are the name."""
        shard = int(self.shard[number])
        start = int(self.offset[number]) - tarfile.BLOCKSIZE
        name = self.files.read(shard, start, 100).partition(b"\0")[0]
        return f"{self.files.paths[shard]}/{name.decode(errors='replace')}"


class OpenFiles:
    """Reads pieces of files and keeps the last ones open: opening is slow on network drives.

    Reads have no position that processes could share, so forked data workers do no harm.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        self.opened: OrderedDict[int, io.FileIO] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Fewer bytes where the file ends before."""
        file = self.opened.pop(number, None) or open(self.paths[number], "rb", buffering=0)
        self.opened[number] = file
        if len(self.opened) > MAX_OPEN:
            self.opened.popitem(last=False)[1].close()
        return os.pread(file.fileno(), size, offset)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"opened": OrderedDict()}
