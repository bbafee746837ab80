"""Resumable work that leaves whole files in a folder: stopped anywhere, the same command goes on.

    record.json          whose files these are, as plain data; once all are there, their SHA-256
    000000.npy, ...      the parts: each whole and verified, or not there
    .000000.npy.sha256   the SHA-256 of a part, until the record holds it

A part is written beside its place, synced, and renamed. Only files whose names match are written
or deleted, and those that are there only where the record says that they are ours.
"""

import contextlib
import hashlib
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from var_exp.io.files import atomic_write, sync

SUM = re.compile(r"\.(.+)\.sha256")
TEMPORARY = re.compile(r"\.(.+)\.\d+(\.\w+)")  # see `replacing`


class Parts:
    """The parts of one piece of work.

    Args:
        folder: need not exist yet; processes may share it.
        record: name of the record file.
        work: plain data that tells this work from others; without the key "parts".
        names: what the names of parts look like.
        option: the option or program that messages begin with.
        remedy: what the user can do where the folder cannot be used, for messages.
    """

    def __init__(
        self,
        folder: Path,
        record: str,
        work: Mapping[str, Any],
        names: re.Pattern,
        option: str,
        remedy: str,
    ):
        self.folder, self.record, self.names = Path(folder), record, names
        self.work = json.loads(json.dumps(work))  # as it is read back
        self.option, self.remedy = option, remedy

    def read_record(self) -> dict[str, Any] | None:
        """The record with its checksums under "parts"; None if the folder has none.

        Raises:
            ValueError: the file is damaged, or parts are there without a record.
        """
        path = self.folder / self.record
        try:
            content = {"parts": {}} | json.loads(path.read_text())
            if content.keys() == {*self.work, "parts"} and all(
                isinstance(checksum, str) for checksum in content["parts"].values()
            ):
                return content
            reason = "is not a record of this program"
        except FileNotFoundError:
            if not self.present():
                return None
            reason = f"is missing, so it is not known whose {self.present()[0]} is"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        except (ValueError, TypeError, AttributeError) as error:  # not JSON, text or objects
            reason = f"is damaged ({error})"
        raise ValueError(f"{self.option}: {str(path)!r} {reason}; {self.remedy}") from None

    def begin(self) -> None:
        """Make the folder, write the record, and delete what a killed process left.

        One process calls it. A record of other work is replaced: look at `read_record` first.

        Raises:
            ValueError: see `read_record`; the folder cannot be written to.
        """
        record = self.read_record() or {}
        known = record.pop("parts", {})
        if record != self.work:
            known = {}
            self._write_record(known)
        for path, name in self._hidden():
            if not SUM.fullmatch(path.name) or known.get(name) == self._checksum(name, {}):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete all parts and the record, which goes last, and the folder if it is empty then.

        Where the record does not say that they are ours, nothing is deleted.
        """
        with contextlib.suppress(ValueError):
            if self.read_record() is not None:
                parts = [self.folder / name for name in self.present()]
                for path in (*parts, *(p for p, _ in self._hidden()), self.folder / self.record):
                    path.unlink(missing_ok=True)
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()

    def present(self) -> list[str]:
        """Names of the parts that are there, whole or not, sorted."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in there if self.names.fullmatch(path.name))

    def missing(self, names: Iterable[str], warn: Callable[[str], None]) -> list[str]:
        """The parts that are to be written: not there, or damaged, which `warn` is told."""
        return [name for name in names if not self.is_whole(name, warn)]

    def is_whole(self, name: str, warn: Callable[[str], None]) -> bool:
        """Whether a part is there and is what was written; `warn` is told where it is damaged."""
        path = self.folder / name
        if not path.is_file():
            return False
        if sha256(path) == self._checksum(name, (self.read_record() or {})["parts"]):
            return True
        warn(f"{self.option}: {str(path)!r} is damaged; it is made again")
        return False

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a part by a function that is given the path to write to.

        Raises:
            ValueError: the file cannot be written.
        """

        def checked(path: Path) -> None:
            write(path)
            # Before the part takes its place: without a checksum it would count as damaged.
            with atomic_write(self._sum(name)) as unfinished:
                unfinished.write_text(sha256(path))

        self._write(name, checked)

    def finish(self, names: Iterable[str]) -> None:
        """Put the checksums of these parts, all of which are there, into the record."""
        known = (self.read_record() or {})["parts"]
        known |= {name: self._checksum(name, known) for name in names}
        self._write_record(dict(sorted(known.items())))
        for path, _ in self._hidden():
            path.unlink(missing_ok=True)

    def _sum(self, name: str) -> Path:
        return self.folder / f".{name}.sha256"

    def _checksum(self, name: str, known: Mapping[str, str]) -> str | None:
        beside = self._sum(name)
        return beside.read_text(errors="replace") if beside.is_file() else known.get(name)

    def _hidden(self) -> list[tuple[Path, str]]:
        """Checksums and unfinished files of ours, each with the name of what it is of."""
        found = []
        for path in self.folder.iterdir():
            name = path.name
            for kind in (TEMPORARY, SUM):  # a checksum may be unfinished, too
                name = "".join(match.groups()) if (match := kind.fullmatch(name)) else name
            if name != path.name and (name == self.record or self.names.fullmatch(name)):
                found.append((path, name))
        return found

    def _write_record(self, parts: Mapping[str, str]) -> None:
        content = self.work | {"parts": parts}
        self._write(self.record, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        path = self.folder / name
        try:
            with atomic_write(path) as unfinished:
                write(unfinished)
                sync(unfinished)
            sync(self.folder)
        except OSError as error:
            raise ValueError(
                f"{self.option}: {str(path)!r} cannot be written ({error.strerror or error}); what "
                f"is there is kept: make room or ask for permission, and the same command goes on; "
                f"or {self.remedy}"
            ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple], workers: int, unit: str
) -> list[Any]:
    """Call `function(*job)` for each job under a progress bar; the results in order.

    The first error ends all.

    Args:
        function: of a module, so that other processes find it.
        workers: processes; 0 for none besides this one.
        unit: what a job is called.
    """
    interval = 0.2 if sys.stderr.isatty() else 30  # seconds between updates; log files keep all
    bar = {"total": len(jobs), "unit": f" {unit}s", "mininterval": interval}
    if workers == 0:
        return [function(*job) for job in tqdm(jobs, **bar)]
    context = multiprocessing.get_context("spawn")  # torch has threads: no forks
    with ProcessPoolExecutor(workers, context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), **bar):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
