"""`train.py` and `sample.py` in processes of their own: watched, told to stop, killed.

They are forked from a server that has imported what they import, which takes seven seconds.
Processes that they start themselves are real.
"""

import atexit
import contextlib
import csv
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers.command import ROOT, Finished, without_rendering

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "helpers.programs", "train", "sample", "wandb"])


def run_script(
    path: str,
    arguments: tuple[str, ...],
    cwd: Path,
    environment: dict[str, str],
    outs: list[str],
    rendering: bool,
) -> None:
    """In the forked process: what `python -u path arguments` does, from the first line on."""
    for number, out in enumerate(outs, start=1):
        os.dup2(os.open(out, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environment
    sys.argv = [path, *arguments]
    try:
        with contextlib.nullcontext() if rendering else without_rendering():
            runpy.run_path(path, run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # which a forked process leaves out


class Forked:
    """A script in a process of its own, in `cwd`; the methods are those of `subprocess.Popen`."""

    def __init__(self, script: str, *arguments: str, cwd: Path, rendering: bool = False):
        cwd.mkdir(parents=True, exist_ok=True)
        self.files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "WANDB_MODE": "offline"}
        outs = [file.name for file in self.files]
        given = (str(ROOT / script), arguments, cwd, environment, outs, rendering)
        self.process = FORKS.Process(target=run_script, args=given)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self.process.exitcode

    def read(self) -> list[str]:
        """What it has written so far to standard output and to standard error."""
        return [Path(file.name).read_text() for file in self.files]

    def end(self, timeout: float = 240) -> Finished:
        """Wait for its end."""
        self.process.join(timeout)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.join()
        return Finished(self.process.exitcode, *self.read())


def run_forked(program: str, *arguments: str, cwd: Path, rendering: bool = False) -> Finished:
    """Run `python {program}.py {arguments}` in a process of its own, from an empty place."""
    return Forked(f"{program}.py", *arguments, cwd=cwd, rendering=rendering).end()


class Program:
    """`train.py` on `folder / "run"`, whose output is read line by line."""

    def __init__(self, folder: Path, *arguments: str, classifier: Path | None = None):
        """Args: classifier: a file of the digits' feature network, which takes long to train."""
        if classifier and not (folder / "run").exists():
            (folder / "run" / "evaluation").mkdir(parents=True)
            shutil.copy(classifier, folder / "run" / "evaluation")
        folders = (f"run_dir={folder}/run", f"runs_dir={folder}")
        self.process = Forked("train.py", *folders, *arguments, cwd=folder)

    def wait_for(self, pattern: str) -> None:
        """Until a line matches."""
        compiled = re.compile(pattern, re.MULTILINE)
        while not compiled.search(said := "".join(self.process.read())):
            assert self.process.poll() is None, f"ended without {pattern!r}: {said}"
            time.sleep(0.01)

    def wait_until_signals_are_in_hand(self) -> None:
        """Before that, the interpreter itself starts."""
        while not is_in("SigCgt", self.process.pid, signal.SIGUSR1):
            time.sleep(0.01)

    def strike(self, number: int, seconds: float) -> tuple[str, int, str]:
        """Send a signal after a while: where the program was, its exit code, what it said."""
        self.wait_until_signals_are_in_hand()
        timer = threading.Timer(seconds, self.process.send_signal, [number])
        timer.start()
        code, said = self.end(timeout=600)
        timer.cancel()
        stages = re.findall(r"^(tokenizer|var): batch", said, re.MULTILINE)
        return f"the {stages[-1]} stage" if stages else "the start", code, said

    def end(self, timeout: float = 240) -> tuple[int, str]:
        """The exit code, and all that was said."""
        code, out, err = self.process.end(timeout)
        return code, out + err

    def children(self) -> list[int]:
        """Processes of the same program that this one started."""
        return children(self.process.pid, "train.py")

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def children(pid: int, program: str) -> list[int]:
    """Processes of a program that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if program in Path(f"/proc/{c}/cmdline").read_text()]


def is_in(mask: str, pid: int, number: int) -> bool:
    """Whether a signal is in a mask of a process: SigCgt, it has a handler; ShdPnd, it is due."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(rf"{mask}:\s*(\w+)", status)[1], 16) & 1 << (number - 1))


def csv_rows(run_dir: Path, stage: str) -> dict[tuple[int, str], str]:
    """What was logged, as a reader sees it: of each step and column the last value counts."""
    found = {}
    with open(run_dir / "csv" / stage / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value and not name.startswith("speed/"):
                    found[step, name] = value
    return found
