"""The two programs as a shell starts them: within this process, which is quick, or for real."""

import contextlib
import copy
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from var_exp.distributed.signals import SIGNALS
from var_exp.experiment.config.overrides import CONF

ROOT = Path(__file__).resolve().parents[2]

# Networks and lengths that take about two seconds for both stages of the digits.
TINY = [
    "trainer.log_every_n_steps=1",
    "tokenizer.encoder.width=16",
    "transformer.depth=1",
    "transformer.width=32",
    "transformer.num_heads=2",
    *(
        f"model.{stage}.{option}"
        for stage in ("tokenizer", "var")
        for option in ("batch_size=16", "num_batches=4", "val_every=2")
    ),
    "evaluation.num_samples=20",
    "evaluation.num_samples_val=10",
    "callbacks.var.pictures.num_per_class=1",
]
QUICK = [*TINY, "logger=csv"]


class Finished(NamedTuple):
    """What a shell sees of a program that has ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that are no progress."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@contextlib.contextmanager
def without_rendering() -> Iterator[None]:
    """Let matplotlib set up every figure and paint none, which takes half of a tiny run."""

    def write_nothing(canvas, out, **_):
        out.write("<svg></svg>")

    blank = np.zeros((8, 8, 3), dtype=np.uint8)
    with (
        mock.patch("var_exp.report.charts.FigureCanvasSVG.print_svg", write_nothing),
        mock.patch("var_exp.visualization.plots._pixels", lambda figure: blank),
    ):
        yield


def run(program: str, *arguments: str, rendering: bool = False) -> Finished:
    """Run `python {program}.py {arguments}` in this process."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    GlobalHydra.instance().clear()
    try:
        sys.argv = [str(ROOT / f"{program}.py"), *arguments]
        figures = contextlib.nullcontext() if rendering else without_rendering()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), figures:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):  # as the interpreter does
            err.write(stop.code + "\n")
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        GlobalHydra.instance().clear()
    return Finished(code, out.getvalue(), err.getvalue())


def run_for_real(program: str, *arguments: str, cwd: Path) -> Finished:
    """Run it in a process of its own, from an empty place."""
    ours = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{program}.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(ours), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@functools.cache
def composed(program: str, *overrides: str) -> DictConfig:
    """The configuration that a command line gives, with Hydra's own under `hydra`.

    To be read, not written: whoever asks for it again gets the same.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(program, overrides=list(overrides), return_hydra_config=True)


@contextlib.contextmanager
def composed_with_hydra(program: str, output_dir: Path, *overrides: str) -> Iterator[DictConfig]:
    """The configuration, inside a job whose folder Hydra has chosen."""
    cfg = copy.deepcopy(composed(program, *overrides))
    cfg.hydra.runtime.output_dir = str(output_dir)
    HydraConfig.instance().cfg = cfg
    try:
        yield cfg
    finally:
        HydraConfig.instance().cfg = None


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path within."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
