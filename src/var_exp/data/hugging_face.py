"""Images of Hugging Face `datasets`: a name on the hub, a folder of parquet files, a saved set.

Not streamed, the set is fetched once into the cache of `datasets`, as Arrow files that are mapped
into memory and read at random. Streamed, nothing is stored: row groups of the parquet files are
read when they are needed (`parquet_images.py`), shuffled within a buffer. Either way it is
map-style, so batch b needs nothing of the batches before it. The library's own streaming is not
used, because what its shuffle buffer holds is lost when a run stops (docs/data.md).

On the hub, name a `revision`: the set may change between the start of a run and its continuation.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image
from pydantic import PositiveInt

from var_exp.configurable import checked
from var_exp.data.encoded import EncodedImages, EncodedSource
from var_exp.data.parquet_images import ParquetImages, decode_struct, open_parquet, read_row_groups
from var_exp.data.shuffle import block_order


class HuggingFace(EncodedSource):
    """A set of images with labels that are classes or whole numbers.

    path:         a name on the hub, a folder of files that `datasets` knows, or what
                  `save_to_disk` wrote
    config:       where the set has several
    split:        the part to train on
    val_split:    the part to validate on; None sets a share of `split` aside
    image_column, label_column: their names; no label_column trains without classes
    revision:     branch, tag or commit on the hub
    streamed:     read parquet files where they are
    shuffle_buffer:       images that are shuffled with each other at a time where it is streamed
    num_streams:        row groups that are read side by side then, over all ranks
    options:      those of `EncodedSource`
    """

    place_option = "data.path=..."
    path: str

    @checked
    def __init__(
        self,
        path: str | None,
        name: str = "hugging_face",
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        revision: str | None = None,
        streamed: bool = False,
        shuffle_buffer: PositiveInt = 1024,
        num_streams: PositiveInt = 8,
        **options,
    ):
        super().__init__(name, **options)
        self.path = path  # type: ignore[assignment]  # `_check_path` refuses None
        self.config, self.revision = config, revision
        self.split, self.val_split = split, val_split
        self.image_column, self.label_column = image_column, label_column
        self.streamed, self.shuffle_buffer, self.num_streams = streamed, shuffle_buffer, num_streams

    def prepare(self) -> None:
        self._check_path()
        if not self.streamed:
            for split in filter(None, (self.split, self.val_split)):
                self._stored(split)  # fetches it

    def load(self) -> tuple[EncodedImages, EncodedImages]:
        self._check_path()
        open_part = self._streamed_part if self.streamed else self._stored_part
        train = open_part(self.split)
        self.class_names = self._class_names(train)
        self.check_classes(self.path)
        if self.val_split is None:
            first, second = self.set_aside(train.labels, self.path)
            return train.images(np.asarray(first)), train.images(np.asarray(second))
        val = open_part(self.val_split)
        same = train.features.get(self.label_column) == val.features.get(self.label_column)
        if not same or not set(np.unique(val.labels)) <= set(range(max(1, self.num_classes))):
            raise ValueError(
                f"{self.name}: the labels of the split {self.val_split!r} of '{self.path}' are not "
                f"those of {self.split!r} (data.val_split)"
            )
        return train.images(np.arange(len(train.labels))), val.images(np.arange(len(val.labels)))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        if not isinstance(self.train, ParquetImages):
            return super().order(seed, epoch)
        return block_order(self.train.group, self.shuffle_buffer, self.num_streams, seed, epoch)

    def _check_path(self) -> None:
        if self.path is None:
            raise ValueError(
                f"{self.name}: no path, expected a name on the Hugging Face hub or a folder: set "
                "data.path=..."
            )
        # What is no name on the hub can only be a folder; to ask for it takes half a minute.
        local = self.path.startswith((".", "/", "~")) or self.path.count("/") > 1
        if local and not Path(self.path).is_dir():
            raise ValueError(f"{self.name}: {self.path!r} is not a folder (data.path=...)")

    def _stored(self, split: str) -> datasets.Dataset:
        try:
            if not is_saved(self.path):
                return datasets.load_dataset(
                    self.path, self.config, split=split, revision=self.revision
                )
            found = datasets.load_from_disk(self.path)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        except Exception as error:  # of the network, the files or the library: anything
            raise self._cannot_open(split, error) from error

    def _stored_part(self, split: str) -> "Part":
        dataset = self._stored(split)
        self._check_columns(dataset.features)
        labels = np.zeros(len(dataset), dtype=np.int64)
        if self.label_column is not None:
            column = dataset.select_columns([self.label_column]).with_format("numpy")
            labels = np.asarray(column[:][self.label_column])
        images = dataset.select_columns([self.image_column])
        images = images.cast_column(self.image_column, datasets.Image(decode=False))

        def select(numbers: np.ndarray) -> StoredImages:
            place = f"{self.path}, split {split}"
            return StoredImages(
                images, place, self.image_column, labels, numbers, self.channels, self.skips
            )

        return Part(dataset.features, labels, select)

    def _streamed_part(self, split: str) -> "Part":
        files = self._files(split)
        with open_parquet(files[0]) as first:
            features = datasets.Features.from_arrow_schema(first.schema_arrow)
        self._check_columns(features)
        groups = read_row_groups(files, self.label_column)
        # Of each lane: what the buffer reaches over, and the groups that it begins and ends in.
        rows_of_group = max(1, len(groups.labels)) / max(1, len(groups.file))
        max_kept = 2 * self.num_streams + int(self.shuffle_buffer / rows_of_group)

        def select(numbers: np.ndarray) -> ParquetImages:
            return ParquetImages(
                groups, self.image_column, numbers, max_kept, self.channels, self.skips
            )

        return Part(features, groups.labels, select)

    def _files(self, split: str) -> list[str]:
        """The addresses of a split's parquet files."""
        if is_saved(self.path):
            raise ValueError(
                f"{self.name}: '{self.path}' was written by save_to_disk, which is read from where "
                "it is anyway: set data.streamed=false"
            )
        try:
            builder = datasets.load_dataset_builder(self.path, self.config, revision=self.revision)
            files = [str(file) for file in builder.config.data_files[split]]
        except Exception as error:
            raise self._cannot_open(split, error) from error
        if not all(file.endswith(".parquet") for file in files):
            raise ValueError(
                f"{self.name}: '{self.path}' has files such as '{files[0]}', expected parquet "
                "files to stream: set data.streamed=false"
            )
        return files

    def _cannot_open(self, split: str, error: Exception) -> ValueError:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        return ValueError(
            f"{self.name}: cannot open the split {split!r} of '{self.path}' ({reason}); data.path "
            "is a name on the Hugging Face hub or a folder (data.path, data.config, data.split)"
        )

    def _check_columns(self, features: datasets.Features) -> None:
        image, label = features.get(self.image_column), features.get(self.label_column)
        if not isinstance(image, datasets.Image):
            raise ValueError(
                f"{self.name}: '{self.path}' has no column of images called {self.image_column!r}, "
                f"its columns are {', '.join(features)} (data.image_column)"
            )
        whole = isinstance(label, datasets.ClassLabel) or getattr(label, "dtype", "")[:3] == "int"
        if self.label_column is not None and not whole:
            raise ValueError(
                f"{self.name}: '{self.path}' has no column of classes or whole numbers called "
                f"{self.label_column!r}, its columns are {', '.join(features)} (data.label_column; "
                "null trains without classes)"
            )

    def _class_names(self, part: "Part") -> tuple[str, ...]:
        if self.label_column is None or not len(part.labels):
            return ()
        if not part.labels.min() >= 0:  # NaN where some are missing
            raise ValueError(
                f"{self.name}: the split {self.split!r} of '{self.path}' has the label "
                f"{part.labels.min()}, expected 0 or more: is it one without labels? (data.split)"
            )
        feature = part.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            return tuple(feature.names)
        return tuple(str(number) for number in range(part.labels.max() + 1))


class Part(NamedTuple):
    """A split: its columns, labels (N,), and how to have the images with some numbers."""

    features: datasets.Features
    labels: np.ndarray
    images: Callable[[np.ndarray], EncodedImages]


class StoredImages(EncodedImages):
    """The rows of a set in Arrow files that have the given numbers; `place` says which set."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        place: str,
        column: str,
        labels: np.ndarray,
        numbers: np.ndarray,
        channels: int,
        skip: bool,
    ):
        super().__init__(labels[numbers], channels, skip)
        self.dataset, self.place, self.column, self.numbers = dataset, place, column, numbers

    def read(self, number: int) -> Image.Image:
        image = self.dataset[int(self.numbers[number])][self.column]
        return decode_struct(image, self.name_of(number), self.mode)

    def name_of(self, number: int) -> str:
        return f"{self.place}, row {self.numbers[number]}"


def is_saved(path: str) -> bool:
    """Whether a folder is what `save_to_disk` wrote: several splits, or one."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))
