"""How programs start and end: signals, the lock of the folder, errors in one line, exit codes."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig

from var_exp.distributed import signals
from var_exp.distributed.launch import agree_on_start
from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import RESUMABLE, STOP_MARKER, Interrupted, leave
from var_exp.distributed.slurm import SUBMIT, check_submission, requeue
from var_exp.experiment.config.checks import check_threads
from var_exp.experiment.config.overrides import (
    check_groups,
    check_renamed,
    nearest_keys,
    shape_of_job,
)
from var_exp.experiment.config.validate import check_types
from var_exp.experiment.errors import is_of_another_process, mistake, should_report
from var_exp.experiment.run import Run
from var_exp.ops.memory import keep_memory


def launch(main: Callable[[], None], config_name: str) -> None:
    """Run a `@hydra.main` function; where Hydra refuses an override, print the nearest key."""
    try:
        agree_on_start()
        if any(re.match(r"\+*check=(?!false)", argument) for argument in sys.argv):
            sys.argv.append("hydra.run.dir=.")  # or Hydra makes the folder of the run
        with contextlib.suppress(HydraException):  # which Hydra reports itself
            check_renamed(sys.argv[1:])
            check_groups(sys.argv[1:])
            if SUBMIT in sys.argv and "--cfg" not in sys.argv:
                check_submission(sys.argv[1:], *shape_of_job(config_name, sys.argv[1:]))
        main()
    except SystemExit as stop:
        if stop.code == 1:
            for hint in nearest_keys(config_name, sys.argv[1:]):
                print(hint, file=sys.stderr)
        raise
    finally:
        signals.handler().finish()


def program(function: Callable[[DictConfig, Run], object]) -> Callable[[DictConfig], object]:
    """Make `function(cfg, run)` a program, to be decorated by `@hydra.main`.

    It holds the run folder, prints a user's mistake as one line, and ends with exit code 85 where
    a signal stopped it: the same command resumes it. With `check` in the configuration only the
    main process runs, and nothing is written.
    """

    @functools.wraps(function)
    def wrapped(cfg: DictConfig) -> object:
        run = Run.of_job(cfg)
        signals.handler().install()  # again: a launcher may run this in a process of its own
        with errors_in_one_line(run):
            check_types(cfg)
            if cfg.get("check"):
                with signals.handler().immediate():
                    return function(cfg, run) if is_main_process() else None
            try:
                with signals.handler().immediate(), run.locked():
                    compute_with(cfg)
                    return function(cfg, run)
            except Interrupted as stop:
                requeue(stop)
                leave(stop, run.path, run.resume_hint)
        return None  # for type checkers: a context could have caught an error

    return wrapped


def compute_with(cfg: DictConfig) -> None:
    """Set what holds for the whole process: its threads, and the memory that it keeps."""
    keep_memory()
    if cfg.get("num_threads"):
        check_threads(cfg)
        torch.set_num_threads(cfg.num_threads)


@contextlib.contextmanager
def errors_in_one_line(run: Run) -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 1, and leave no empty run folder.

    Mistakes are ValueErrors, arguments that no constructor knows (`+key=value`) or that one lacks
    (`~key`), what Lightning's Trainer refuses, and networks that memory does not hold. The whole
    traceback comes with HYDRA_FULL_ERROR=1.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if message := mistake(error):
            run.remove_if_empty()
            sys.exit(f"error: {message}" if should_report() else 1)
        if not isinstance(error, RuntimeError) or not is_of_another_process(error):
            raise
        sys.exit(leave_with_the_others(run, error))


def leave_with_the_others(run: Run, error: BaseException) -> int:
    """Print that another process of the run has ended; return the exit code, by what ended it.

    The first cause is printed too: it may be a failure of this process, or of the network.
    """
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    cause = next(iter(str(error).splitlines()), "")
    print(
        f"error: another process of this run has ended, which says why where it printed; what was "
        f"saved is whole; {run.resume_hint} (seen here: {type(error).__name__}: {cause})",
        file=sys.stderr,
        flush=True,
    )
    return RESUMABLE if (run.path / STOP_MARKER).exists() else 1
