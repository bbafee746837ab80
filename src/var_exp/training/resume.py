"""Where a stage resumes from: the newest whole checkpoint, and the best one."""

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from var_exp.checkpoint.checkpoint import KEY, read_checkpoint
from var_exp.distributed.rank import is_main_process
from var_exp.io.files import atomic_write, verify_checksum

LOGS = ("csv", "tensorboard")  # where a run folder has logs of its stages, see conf/logger
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


def forget(run_dir: Path, stage: str) -> None:
    """Delete what a stage left in a run folder: checkpoints, pictures, logs, and its W&B id."""
    for folder in (run_dir / stage, *(run_dir / name / stage for name in LOGS)):
        if folder.is_dir():
            shutil.rmtree(folder)


class Found(NamedTuple):
    """A checkpoint that a stage goes on from: where it is, and what it holds."""

    path: Path
    content: dict[str, Any]


def newest_path(folder: Path) -> Path | None:
    """The newest checkpoint of a stage's folder, whole or not."""
    return next((folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()), None)


def newest(folder: Path) -> Found | None:
    """The newest whole checkpoint of a stage's folder; None where there is none at all.

    Raises:
        ValueError: there are some, and all of them are damaged.
    """
    refused = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            found = Found(path, read_checkpoint(path))
        except ValueError as error:
            refused.append(str(error))
        else:
            for reason in refused:
                say(f"{reason}; going on from {str(path)!r}")
            return found
    if refused:
        raise ValueError(
            f"{'; '.join(refused)}; nothing is left to go on from, resume=never starts over"
        )
    return None


def earlier(run_dir: Path, stage: str, resume: str) -> Found | None:
    """What a stage goes on from.

    Args:
        resume: "auto": what is in the run folder; "never": nothing; or a checkpoint, a run folder
            or the folder of one of its stages. One that is elsewhere is where a run folder
            begins, and not used again once the stage has checkpoints there: so the same command
            goes on after an interruption.

    Raises:
        ValueError: there is no such file, it is damaged, or a folder holds no checkpoints.
    """
    folder = run_dir / stage
    if resume == "never":
        return None
    if resume == "auto":
        return newest(folder)
    path = Path(resume).resolve()
    if not path.exists():
        raise ValueError(
            f"resume: expected auto, never, a checkpoint or a run folder, there is no {resume!r}"
        )
    if not path.is_relative_to(run_dir.resolve()) and (own := newest(folder)):
        return own
    if path.is_dir() and any(newest_path(of_stage) for of_stage in path.iterdir()):
        return newest(path / stage)
    found = newest(path) if path.is_dir() else Found(path, read_checkpoint(path))
    if found is None:
        raise ValueError(
            f"resume: expected a checkpoint, a run folder or a stage's folder, {resume!r} holds "
            f"neither {LAST} nor a stage with one"
        )
    return found if found.content[KEY]["stage"] == stage else newest(folder)


def provide_best(folder: Path, found: Found) -> None:
    """See to it that `best.ckpt` is there and whole, where what a stage goes on from had one.

    The very state that the stage goes on from may be the best one. Where it is lost, that is
    said, and the best of the validations to come takes its place.
    """
    state = found.content["callbacks"]["Checkpoints"]
    if state["best"] is None:
        return
    best = found.path.with_name(BEST)
    try:
        verify_checksum(best)
        if best.parent != folder and (batch := batch_of(best)) != state["best_batch"]:
            raise ValueError(f"it is of batch {batch}, the best so far was {state['best_batch']}")
    except ValueError as error:
        (folder / BEST).unlink(missing_ok=True)
        if state["best_batch"] != progress_in(found.content)["batch"]:
            say(f"checkpoint: {str(best)!r}: {error}; the best of what follows takes its place")
            return
        best = found.path
    if best != folder / BEST:
        with atomic_write(folder / BEST) as unfinished:
            shutil.copyfile(best, unfinished)


def batch_of(path: Path) -> int:
    """The batch after which a checkpoint was saved."""
    return progress_in(read_checkpoint(path))["batch"]


def best_or_newest(folder: Path) -> dict[str, Any]:
    """The content of the best checkpoint, or of the newest one where the best one is damaged."""
    try:
        return read_checkpoint(folder / BEST)
    except ValueError as error:
        found = newest(folder)
        if found is None:
            raise
        say(f"{error}; taking the weights of {str(found.path)!r}")
        return found.content


def progress_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `BatchProgress` wrote into a checkpoint: batch, seconds, plan."""
    return checkpoint["callbacks"]["BatchProgress"]


def is_finished(checkpoint: dict[str, Any]) -> bool:
    """Whether nothing is left to train, nor to validate."""
    progress = progress_in(checkpoint)
    due = checkpoint["callbacks"]["Checkpoints"]["validation_due"]
    return progress["batch"] == progress["plan"]["num_batches"] and not due


def say(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
