"""`train.py` in processes of its own: watched, told to stop, killed."""

import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers.command import ROOT


class Program:
    """`train.py` on `folder / "run"`, whose output is read line by line."""

    def __init__(self, folder: Path, *arguments: str):
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-u", str(ROOT / "train.py"), f"run_dir={folder}/run"]
        self.process = subprocess.Popen(
            [*command, f"runs_dir={folder}", *arguments],
            env=environment | {"WANDB_MODE": "offline"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> None:
        """Read on until a line matches."""
        for line in self.process.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError(f"ended without {pattern!r}: {''.join(self.lines)}")

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
        try:
            out, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, "".join(self.lines) + out

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
