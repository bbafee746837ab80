"""A set of images in the codes of a tokenizer, on the disk: what stage two trains from.

    tokens.json            what the codes are of: tokenizer, images, seed; in the end, with the
                           SHA-256 of each part
    train-0000-00000.npy   view 0 of the first training images: their codes and labels
    val-00000.npy          the first validation images, as they are

A view is the training set as one epoch sees it: view v of image i is what epoch v would make of
it. Epoch e reads view e % views, so with as many views as epochs the transformer sees the very
codes that it would see without the cache.

Encoding may be stopped at any point (`var_exp.io.parts`). Codes that are there are never taken for
those of another tokenizer or of other images: the key must be the same.

    N images, L tokens
"""

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var_exp.io.files import differences
from var_exp.io.parts import Parts
from var_exp.io.text import amount
from var_exp.scales import total_tokens

FORM = 1
ROWS = 16_384  # images of a part
RECORD = "tokens.json"
NAMES = re.compile(r"((train-\d{4,}|val)-\d{5,}\.npy)|key\.json")  # key.json: of earlier versions
NEAR = 2  # views whose parts are kept open: a batch may span two epochs
REMEDY = "use another folder (tokens.dir=...), or delete it"


class Part(NamedTuple):
    """Images `start` to `stop` - 1 of a view; those of validation where the view is None."""

    view: int | None
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        of = "val" if self.view is None else f"train-{self.view:04d}"
        return f"{of}-{self.number:05d}.npy"

    @property
    def rows(self) -> int:
        return self.stop - self.start


class TokenCache:
    """The files of one folder.

    Args:
        folder: need not exist yet.
        key: plain data that tells these codes from others, see `cache_key`: patch_nums,
            vocab_size, num_train, num_val and rows are read here. A tokenizer of None is one
            that is not known yet: it equals all.
        views: of each training image, at least 1.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], views: int = 1):
        self.folder, self.views = Path(folder), views
        self.files = files_in(folder, {"form": FORM, **key})
        self.key: dict[str, Any] = self.files.work["key"]
        self.length = total_tokens(key["patch_nums"])
        smallest = np.promote_types(np.uint16, np.min_scalar_type(key["vocab_size"] - 1))
        self.dtype = np.dtype([("codes", smallest, (self.length,)), ("label", np.int32)])
        self._open: dict[int | None, list[np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # maps do not travel to other processes

    @property
    def num_images(self) -> int:
        """How many are encoded: views of training images, and validation images."""
        return self.views * self.key["num_train"] + self.key["num_val"]

    @property
    def sizes(self) -> str:
        """The same, in words."""
        views = f" x {self.views} views" if self.views > 1 else ""
        return f"{self.key['num_train']:,} to train on{views}, {self.key['num_val']:,} to validate"

    @property
    def num_bytes(self) -> int:
        """Of all parts, but for a hundred bytes of each."""
        return self.num_images * self.dtype.itemsize

    def parts(self) -> list[Part]:
        views = [*range(self.views), None]
        return [part for view in views for part in self.parts_of(view)]

    def parts_of(self, view: int | None) -> list[Part]:
        count, rows = self.key["num_val" if view is None else "num_train"], self.key["rows"]
        starts = range(0, count, rows)
        return [Part(view, n, start, min(start + rows, count)) for n, start in enumerate(starts)]

    # -- the key ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError where the folder holds codes of something else, or a damaged record."""
        record = self.files.read_record()
        if record is not None and (found := self._differences(record.get("key"))):
            raise ValueError(
                f"tokens: {str(self.folder)!r} holds other codes: {'; '.join(found)}; {REMEDY}"
            )

    def begin(self) -> None:
        """Make the folder, and record in it what its codes will be of; one process calls it.

        Raises:
            ValueError: see `check`; or the folder cannot be written to.
        """
        assert self.key["tokenizer"] is not None, "codes of a tokenizer that is known"
        self.check()
        self.files.begin()

    # -- writing ------------------------------------------------------------------------------

    def check_room(self, num_images: int, free: int) -> None:
        """Raise ValueError where the codes of so many images do not fit into `free` bytes."""
        needed = num_images * self.dtype.itemsize
        if needed > free:
            raise ValueError(
                f"tokens: the codes of {num_images:,} images take {amount(needed)}, "
                f"{amount(free)} are free at {str(self.folder)!r}; make room, take fewer views "
                f"(tokens.views, now {self.views}), or choose another folder (tokens.dir=...)"
            )

    def missing(self, warn: Callable[[str], None] = lambda line: None) -> list[Part]:
        """Parts that are to be encoded: not there, or damaged, which `warn` is told."""
        names = set(self.files.missing((part.name for part in self.parts()), warn))
        return [part for part in self.parts() if part.name in names]

    def write(self, part: Part, codes: np.ndarray, labels: np.ndarray) -> None:
        """Write a part: codes (rows, L), labels (rows,).

        Raises:
            ValueError: there is no room, or no permission.
        """
        rows = np.empty(part.rows, self.dtype)
        rows["codes"], rows["label"] = codes, labels
        self.files.write(part.name, lambda path: np.save(path, rows))

    def finish(self) -> None:
        """Complete the record, once all parts are there; earlier views stay in it."""
        self.files.finish(part.name for part in self.parts())

    # -- reading ------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether all parts were once there, and are; not whether they are whole.

        Raises:
            ValueError: see `check`.
        """
        self.check()
        names = {part.name for part in self.parts()}
        record = self.files.read_record()
        return record is not None and names <= record["parts"].keys() & {*self.files.present()}

    def read(self, view: int | None, indices: np.ndarray) -> np.ndarray:
        """Rows with `codes` (L,) and `label` of images (B,) of a view; None: of validation."""
        parts = self._mapped(view)
        if len(parts) == 1:
            return parts[0][indices]
        numbers, places = np.divmod(indices, self.key["rows"])
        rows = np.empty(len(indices), self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            rows[here] = parts[number][places[here]]
        return rows

    def _mapped(self, view: int | None) -> list[np.ndarray]:
        """The parts of a view, in memory maps."""
        if view not in self._open:
            training = [v for v in self._open if v is not None]
            if view is not None and len(training) >= NEAR:
                del self._open[training[0]]  # the one that was opened first
            self._open[view] = [self._map(part.name) for part in self.parts_of(view)]
        return self._open[view]

    def _map(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))

    def _differences(self, theirs: Any) -> list[str]:
        """What another key says otherwise, in words."""
        known = self.key["tokenizer"] is not None or not isinstance(theirs, dict)
        ours = self.key if known else self.key | {"tokenizer": theirs.get("tokenizer")}
        return [
            f"{name.removeprefix('key.')} {shorten(a)}, this run has {shorten(b)}"
            for name, a, b in differences(theirs, ours, "key")
        ]


def files_in(folder: Path, key: Mapping[str, Any]) -> Parts:
    return Parts(folder, RECORD, {"key": key}, NAMES, "tokens", REMEDY)


def delete_codes(folder: Path) -> None:
    """Delete the codes in a folder that a record says are ours, and the folder if it is empty."""
    files_in(folder, {}).remove()


def shorten(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder="...")
