"""The command line around Hydra: what a person sees when something is wrong, and at the end."""

import contextlib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from var_exp.distributed.collectives import is_distributed
from var_exp.distributed.launch import START, agree_on_start
from var_exp.distributed.signals import GOES_ON, RESUMABLE, TRACE
from var_exp.distributed.slurm import SUBMIT, check_submission
from var_exp.experiment.config.overrides import (
    as_override,
    check_groups,
    nearest_keys,
    shape_of_job,
)
from var_exp.experiment.config.validate import check_types
from var_exp.experiment.errors import first_cause, is_of_another_process, mistake
from var_exp.io.environment import environment
from var_exp.io.files import replacing
from var_exp.io.run_folder import Metrics, remove_if_empty
from var_exp.io.text import _cell, shown_path, table

SHOWN = (  # how keys of figures begin that say most
    *("psnr", "ssim", "loss", "acc", "class_accuracy", "fid", "rfid", "inception_score"),
    *("precision", "recall", "seconds"),
)


def launch(main: Callable[[], None], config_name: str) -> None:
    """Run a `@hydra.main` function; where Hydra refuses an override, name the nearest key."""
    agree_on_start()
    with contextlib.suppress(HydraException):  # which Hydra will tell of
        check_groups(sys.argv[1:])
    if SUBMIT in sys.argv and "--cfg" not in sys.argv:
        with contextlib.suppress(HydraException):  # which Hydra will tell of
            check_submission(sys.argv[1:], *shape_of_job(config_name, sys.argv[1:]))
    try:
        main()
    except SystemExit as stop:
        if stop.code == 1:
            for hint in nearest_keys(config_name, sys.argv[1:]):
                print(hint, file=sys.stderr)
        raise


def report_errors(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """Turn a user's mistake into one line and exit code 1, and leave no empty run folder.

    Mistakes are ValueErrors, arguments that no constructor knows (`+key=value`) or that one lacks
    (`~key`), what Lightning's Trainer refuses, and networks that memory does not hold. The whole
    traceback comes with HYDRA_FULL_ERROR=1.
    """

    @functools.wraps(function)
    def wrapped(config: DictConfig) -> object:
        try:
            check_types(config)
            return function(config)
        except Exception as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            run_dir = Path(HydraConfig.get().runtime.output_dir)
            if told := mistake(error):
                remove_if_empty(run_dir)
                sys.exit(f"error: {told}" if speaks() else 1)
            if not isinstance(error, RuntimeError) or not is_of_another_process(error):
                raise
            goes_on = how_to_go_on(run_dir) if "run_dir" in config else GOES_ON
            sys.exit(leave_with_the_others(run_dir, error, goes_on))

    return wrapped


def speaks() -> bool:
    """Whether this process says what went wrong.

    Before processes have met, all of a machine make the same mistake, and its first one says so.
    """
    names = ("LOCAL_RANK", "SLURM_LOCALID")
    local_rank = int(next((os.environ[name] for name in names if name in os.environ), 0))
    return local_rank == 0 or is_distributed()


def leave_with_the_others(run_dir: Path, error: BaseException, goes_on: str) -> int:
    """Say that another process of the run has ended; the exit code, by what ended it.

    What was seen of it is said too: it may be a failure of this process, or of the network.
    """
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    seen = next(iter(str(error).splitlines()), "")
    print(
        f"error: another process of this run has ended, which says why where it printed; what was "
        f"saved is whole; {goes_on} (seen here: {type(error).__name__}: {seen})",
        file=sys.stderr,
        flush=True,
    )
    return RESUMABLE if (run_dir / TRACE).exists() else 1


def check_sweep(num_processes: int) -> None:
    """Raise ValueError for several processes in a sweep that Hydra runs within this one.

    Each process that Lightning starts would start the program again, and with it the sweep.
    """
    hydra = HydraConfig.get()
    within = hydra.launcher.get("_target_", "").endswith("BasicLauncher")
    if hydra.mode == RunMode.MULTIRUN and within and num_processes > 1:
        raise ValueError(
            f"devices: expected 1 with --multirun, whose points are run by this process, got "
            f"{num_processes}; run them one by one, or as jobs (hydra/launcher=slurm)"
        )


def how_to_go_on(run_dir: Path) -> str:
    """What goes on with a run when it is typed: its folder by name, or it would get a new one."""
    folder = as_override("run_dir", str(shown_path(run_dir)))
    if START in os.environ:  # of torchrun or srun, whose own arguments are not known here
        return f"the same command goes on with {folder}"
    given = HydraConfig.get().overrides.task
    kept = [o for o in given if not o.lstrip("+").startswith(("run_dir=", "resume=never"))]
    return f"to go on: {shlex.join(['python', Path(sys.argv[0]).name, *kept, folder])}"


def record_composition(config: DictConfig, run_dir: Path) -> None:
    """Write what Hydra keeps under `.hydra`, in its form.

    Not by Hydra, which writes before the job starts: a refused run would replace the record of
    the run whose folder it names.
    """
    hydra = HydraConfig.get()
    folder = run_dir / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    OmegaConf.save({"hydra": hydra}, folder / "hydra.yaml")
    OmegaConf.save(hydra.overrides.task, folder / "overrides.yaml")
    with replacing(run_dir / "environment.json") as unfinished:
        unfinished.write_text(json.dumps(environment(), indent=2) + "\n")


def recorded(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the environment that a run was started with, as plain data.

    Raises:
        ValueError: they are missing, or cannot be read.
    """
    path = run_dir / ".hydra" / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return config, json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"resume: {str(run_dir)!r} has checkpoints, but not what they were trained with ("
            f"{first_cause(error)}); begin a new run folder where this one is (resume={run_dir} "
            f"with a new run_dir), or anew (resume=never)"
        ) from None


def summary(name: str, metrics: Metrics, run_dir: Path, expected: Mapping[str, list[float]]) -> str:
    """The table at the end of a run: the figures that say most, and where the rest is.

    Beside a figure stands the band (low, high) where it was expected, if one was named.
    """
    rows: dict[str, object] = {
        key: value
        for key, value in metrics.figures.items()
        if key.split("/")[1].startswith(SHOWN) and "_scale" not in key or key in expected
    }
    for key, (low, high) in expected.items():
        if key in rows:
            rows[key] = f"{_cell(rows[key])}  (expected {low:g} to {high:g})"
    rows |= {"all figures": run_dir / "metrics.json", "report": run_dir / "report.html"}
    return table(f"{name}: what was reached", rows)


# -- what a composition needs besides itself ------------------------------------------------

PERCEPTUAL = "model.tokenizer.module.loss.perceptual"


def parts_from_files(cfg: DictConfig) -> dict[str, Callable[[], object]]:
    """What makes each part of a training that is read from a file of others, by its key."""
    keys = [PERCEPTUAL, "adversary"] if "tokenizer" in cfg.stages else []
    chosen = {key: OmegaConf.select(cfg, key) for key in keys}
    parts = {key: functools.partial(instantiate, c) for key, c in chosen.items() if c is not None}
    if "weights" in cfg.evaluation.network:  # others are trained on the images
        parts["evaluation.network"] = lambda: instantiate(cfg.evaluation.network)(None, None)
    return parts


def without_parts(cfg: DictConfig, keys: Iterable[str]) -> DictConfig:
    """The composition without some of those parts."""
    cfg = cfg.copy()
    for key in keys:
        OmegaConf.update(cfg, key, None)
        if key == PERCEPTUAL:
            cfg.model.tokenizer.module.loss.lpips = 0
    return cfg
