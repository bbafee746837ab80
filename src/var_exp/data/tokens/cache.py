"""A set of images in the codes of a tokenizer, on the disk: what stage two trains from.

    key.json               what the codes are of: tokenizer, images, seed; written first
    train-0000-00000.npy   view 0 of the first training images: their codes and labels
    val-00000.npy          the first validation images, as they are
    tokens.json            the SHA-256 of each part; written last

A view is the training set as one epoch sees it: view v of image i is what epoch v would make of
it. Epoch e reads view e % views, so with as many views as epochs the transformer sees the very
codes that it would see without the cache.

A part is written beside its place and is on the disk before it takes its place, so a part that is
there is whole: who was stopped goes on with those that are missing. It ends with its own SHA-256,
which counts until there is a manifest. Codes that are there are never taken for those of another
tokenizer or of other images: the key must be the same.

    N images, L tokens
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var_exp.io.files import append_seal, check_seal, differences, replacing, sync
from var_exp.io.text import amount
from var_exp.scales import total_tokens

FORM = 1
ROWS = 16_384  # images of a part
KEY, MANIFEST = "key.json", "tokens.json"
OURS = re.compile(r"((train-\d{4,}|val)-\d{5,}\.npy)|key\.json|tokens\.json")
UNFINISHED = re.compile(r"\.((train-\d{4,}|val)-\d{5,}|key|tokens)\.\d+\.(npy|json)")
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
        self.key: dict[str, Any] = json.loads(json.dumps({"form": FORM, **key}))
        self.length = total_tokens(key["patch_nums"])
        smallest = np.promote_types(np.uint16, np.min_scalar_type(key["vocab_size"] - 1))
        self.dtype = np.dtype([("codes", smallest, (self.length,)), ("label", np.int32)])
        self._digests: dict[str, str] = {}  # of parts that this process has seen whole
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
        """Raise ValueError where the folder holds codes of something else, or no codes."""
        theirs = self._read(KEY)
        if theirs is None:
            if files_of(self.folder):
                raise ValueError(
                    f"tokens: {str(self.folder / KEY)!r} is missing, so it is not known whose "
                    f"codes are there; {REMEDY}"
                )
            return
        if found := self._differences(theirs):
            raise ValueError(
                f"tokens: {str(self.folder)!r} holds other codes: {'; '.join(found)}; {REMEDY}"
            )

    def begin(self) -> None:
        """Make the folder, and say in it what its codes will be of; to be called by one process.

        Raises:
            ValueError: see `check`; or the folder cannot be written to.
        """
        assert self.key["tokenizer"] is not None, "codes of a tokenizer that is known"
        self.check()
        for path in files_of(self.folder, UNFINISHED):
            path.unlink(missing_ok=True)
        if not (self.folder / KEY).exists():
            self._write(KEY, lambda path: path.write_text(json.dumps(self.key, indent=2) + "\n"))

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

    def missing(self, tell: Callable[[str], None] = lambda line: None) -> list[Part]:
        """Parts that are to be encoded: not there, or damaged, which is told.

        Raises:
            ValueError: the manifest is damaged.
        """
        known = self._manifest()
        found = []
        for part in self.parts():
            path = self.folder / part.name
            if not path.exists():
                found.append(part)
            elif not self._is_whole(part, known.get(part.name)):
                tell(f"tokens: {str(path)!r} is damaged; its images are encoded anew")
                self._digests.pop(part.name, None)  # another process may write it
                found.append(part)
        return found

    def write(self, part: Part, codes: np.ndarray, labels: np.ndarray) -> None:
        """Write a part: codes (rows, L), labels (rows,).

        Raises:
            ValueError: there is no room, or no permission.
        """
        rows = np.empty(part.rows, self.dtype)
        rows["codes"], rows["label"] = codes, labels
        self._digests.pop(part.name, None)

        def sealed(path: Path) -> None:
            np.save(path, rows)
            append_seal(path)

        self._write(part.name, sealed)

    def finish(self) -> None:
        """Write the manifest, once all parts are there; earlier views stay in it."""
        digests = {part.name: self._digest(part.name) for part in self.parts()}
        parts = dict(sorted((self._manifest() | digests).items()))
        content = {"key": self.key, "parts": parts}
        self._write(MANIFEST, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    # -- reading ------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether all parts were once there, and are; not whether they are whole.

        Raises:
            ValueError: see `check`; or the manifest is damaged.
        """
        self.check()
        names = {part.name for part in self.parts()}
        return names <= self._manifest().keys() and names <= {p.name for p in files_of(self.folder)}

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

    # -- files --------------------------------------------------------------------------------

    def _manifest(self) -> dict[str, str]:
        """The SHA-256 of each part; empty where there is no manifest yet."""
        content = self._read(MANIFEST)
        if content is None:
            return {}
        parts = content.get("parts")
        whole = isinstance(parts, dict) and all(isinstance(d, str) for d in parts.values())
        if not whole or self._differences(content.get("key")):
            raise ValueError(
                f"tokens: {str(self.folder / MANIFEST)!r} is damaged, or of other codes; delete "
                f"it, and the same command makes another one"
            )
        return parts

    def _is_whole(self, part: Part, digest: str | None) -> bool:
        """Whether a part is what the manifest says, or before there is one, what was written."""
        try:
            rows = self._map(part.name)
            if (rows.shape, rows.dtype) != ((part.rows,), self.dtype):
                return False
            if digest is None:
                check_seal(self.folder / part.name)
                return True
            return self._digest(part.name) == digest
        except Exception:  # a damaged header raises anything, from EOFError to SyntaxError
            return False

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            with open(self.folder / name, "rb") as file:
                self._digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[name]

    def _read(self, name: str) -> dict[str, Any] | None:
        """A JSON file; None where there is none."""
        path = self.folder / name
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict):
                return content
            reason = "it holds no object"
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror
        except ValueError as error:  # no JSON, or no text
            reason = str(error)
        raise ValueError(f"tokens: {str(path)!r} is damaged ({reason}); {REMEDY}")

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        path = self.folder / name
        try:
            with replacing(path) as unfinished:
                write(unfinished)
                sync(unfinished)
            sync(self.folder)
        except OSError as error:
            raise ValueError(
                f"tokens: {str(path)!r} cannot be written ({error.strerror or error}); what is "
                f"there is kept: make room or ask for permission, and the same command goes on; "
                f"or choose another folder (tokens.dir=...)"
            ) from None

    def _differences(self, theirs: Any) -> list[str]:
        """What another key says otherwise, in words."""
        known = self.key["tokenizer"] is not None or not isinstance(theirs, dict)
        ours = self.key if known else self.key | {"tokenizer": theirs.get("tokenizer")}
        return [
            f"{name.removeprefix('key.')} {shorten(a)}, this run has {shorten(b)}"
            for name, a, b in differences(theirs, ours, "key")
        ]


def files_of(folder: Path, names: re.Pattern = OURS) -> list[Path]:
    """What is of a cache in a folder."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in there if names.fullmatch(path.name))


def forget_codes(folder: Path) -> None:
    """Delete what is of a cache in a folder, and the folder if nothing else is in it."""
    for path in (*files_of(folder), *files_of(folder, UNFINISHED)):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def shorten(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder="...")
