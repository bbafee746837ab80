"""A program that is asked to stop stops where nothing is lost, and says so by its exit code.

SIGTERM comes from a cluster that wants its machine back, SIGUSR1 from Slurm before the time limit,
SIGINT from a keyboard. They are noted, and the training loop looks at the note after each batch.
Elsewhere, where files are written whole or not at all, they are heeded: they end the program on
the spot. While it imports its libraries and while it leaves they are only noted, so that all end
in one place, where a job may ask to be started again. The exit code 85 says: interrupted, and the
same command goes on. A second Ctrl-C does not wait.

This module is light, so that a program can take its signals in hand before its slow imports.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from var_exp.distributed.rank import is_main_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESUMABLE = 85  # the exit code of a program that was interrupted and can go on
RESUME_HINT = "the same command goes on"
STOP_MARKER = ".interrupted"  # in the run folder: a process of this start was interrupted


class Interrupted(SystemExit):
    """Raised where the program stops; no error, so that none catches it. Its code is 85.

    `saved` is False where what was done last could not be written.
    """

    def __init__(self, number: int, saved: bool = True):
        super().__init__(RESUMABLE)
        self.number, self.saved = signal.Signals(number), saved

    def __str__(self) -> str:
        return self.number.name


class SignalHandler:
    """The signals that ask this process to stop; one object for the whole program.

    `noted` is the number of the first signal, None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._heeded = False

    def __reduce__(self) -> tuple:
        return SignalHandler, ()  # in another process nothing has happened yet

    def install(self) -> None:
        """Take the signals in hand, unless this is a thread that is given none."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def finish(self) -> None:
        """The program is over: of its exit code nothing but Ctrl-C makes another one."""
        if threading.current_thread() is threading.main_thread():
            ignore_signals()
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, self.received or number
        if self._heeded:
            raise Interrupted(self.received)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def immediate(self, heed: bool = True) -> Iterator[None]:
        """Within this block a signal ends the program on the spot, an earlier one here."""
        before, self._heeded = self._heeded, heed
        try:
            self.raise_if_received()
            yield
        finally:
            self._heeded = before

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block signals are noted only, and end the program before or after it."""
        with self.immediate(False):
            yield
        self.raise_if_received()

    def raise_if_received(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)


_handler = SignalHandler()


def start() -> None:
    """Take the signals in hand at the start of a program, before its slow imports."""
    global _handler
    _handler = SignalHandler()
    _handler.install()


def handler() -> SignalHandler:
    """The signals of this process."""
    return _handler


def leave(stop: Interrupted, run_dir: Path | None = None, goes_on: str = RESUME_HINT) -> None:
    """End this process, and let the other processes of the run know why.

    Args:
        goes_on: what to do to go on, in words.

    Of several processes the first one says 85. The others end with 0: whoever started them, this
    program, torchrun or srun, may end the first one at once for the failure of another.
    """
    if run_dir is not None and run_dir.is_dir():
        with contextlib.suppress(OSError):
            unfinished = run_dir / f"{STOP_MARKER}.{os.getpid()}"
            unfinished.write_text(f"{stop}\n")
            unfinished.replace(run_dir / STOP_MARKER)  # in one step: other processes may read it
    if not is_main_process():
        sys.exit(0)
    lost = "" if stop.saved else "; what came after the last checkpoint could not be saved"
    print(f"stopped by {stop}{lost}; {goes_on}", file=sys.stderr, flush=True)
    raise stop


def clear_stop_marker(run_dir: Path) -> None:
    """Called when a run starts or goes on."""
    (run_dir / STOP_MARKER).unlink(missing_ok=True)


def raise_if_stopped_elsewhere(run_dir: Path) -> None:
    """Raise Interrupted if another process of this start was, where they seldom meet."""
    with contextlib.suppress(FileNotFoundError):
        raise Interrupted(signal.Signals[(run_dir / STOP_MARKER).read_text().strip()])


def ignore_signals(*_: Any) -> None:
    """For processes that load data: who asks the whole group to stop means the one they serve.

    Theirs is told by closing its queue, and ends them.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
