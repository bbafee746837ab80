"""The command line around Hydra: what a person sees when something is wrong, and at the end."""

import contextlib
import difflib
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from var_exp.environment import environment
from var_exp.files import read_figures, replacing
from var_exp.interruption import GOES_ON, RESUMABLE, TRACE
from var_exp.options import check_types
from var_exp.processes import START, agree_on_start
from var_exp.ranks import is_distributed
from var_exp.slurm import SUBMIT, check_submission

SHOWN = (  # how keys of figures begin that say most
    *("psnr", "ssim", "loss", "acc", "class_accuracy", "fid", "rfid", "inception_score"),
    *("precision", "recall", "seconds"),
)
PROTOCOL = "protocol"  # the key of metrics.json that is no figure
WRONG_ARGUMENTS = ("unexpected keyword argument", "required positional argument")
FULL_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
OUT_OF_MEMORY = (
    "memory is full; take a smaller data.image_size, batch_size, "
    "model.<stage>.module.micro_batch or network: check=true says what a run takes"
)
CONF = Path(__file__).resolve().parents[2] / "conf"


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


def shape_of_job(config_name: str, arguments: list[str]) -> list[object]:
    """Devices and machines, as a command line without its sweep names them; each may be missing."""
    GlobalHydra.instance().clear()
    shaping = [a for a in arguments if a.startswith(("experiment=", "trainer=", "trainer."))]
    with initialize_config_dir(str(CONF), version_base=None):
        trainer = compose(config_name, overrides=shaping).get("trainer", {})
    return [trainer.get(key) for key in ("devices", "num_nodes")]


def config_groups() -> set[str]:
    return {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}


def check_groups(arguments: list[str]) -> None:
    """End where a choice of a group is no name: Hydra would say so without saying where."""
    groups = config_groups()
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(given):
        group, kind = override.key_or_group, override.value_type
        if group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        if group.startswith("hydra") or group == "callbacks":  # which have other choices, or none
            continue
        if kind is not ValueType.ELEMENT or isinstance(override.value(), str | list | dict):
            continue
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        text = override.input_line
        sys.exit(f"error: {group}: expected one of {names}, got {text.partition('=')[2]}")


def nearest_keys(config_name: str, arguments: list[str]) -> list[str]:
    """For each override of a key that does not exist, a line with the nearest that does."""
    GlobalHydra.instance().clear()
    groups = config_groups()
    choices = [a for a in arguments if a.partition("=")[0].partition("@")[0] in groups]
    with initialize_config_dir(str(CONF), version_base=None):
        try:
            config = compose(config_name, overrides=choices)
        except Exception:  # a choice that does not exist, or no name at all: Hydra tells of it
            config = compose(config_name)
    known = groups | set(_flatten(OmegaConf.to_container(config, resolve=False)))
    hints = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or key.startswith(("+", "~", "-", "hydra")) or key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if near:
            hints.append(f"{key!r} is not a key of {config_name}; the nearest is {near[0]!r}")
    return hints


def _flatten(tree: Mapping, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{name}.")
    return keys


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


def mistake(error: Exception) -> str | None:
    """What a user reads of an exception, in one line; None for one that is no user's mistake."""
    told = first_cause(error)
    if isinstance(error, MemoryError) or any(words in told for words in FULL_MEMORY):
        return f"{OUT_OF_MEMORY} ({told})"
    if isinstance(error, ValueError | HydraException | OmegaConfBaseException):
        return told
    if isinstance(error, TypeError) and any(words in told for words in WRONG_ARGUMENTS):
        return told
    # Lightning's, for arguments of its Trainer; only training may import it.
    return f"trainer: {told}" if type(error).__name__ == "MisconfigurationException" else None


def speaks() -> bool:
    """Whether this process says what went wrong.

    Before processes have met, all of a machine make the same mistake, and its first one says so.
    """
    names = ("LOCAL_RANK", "SLURM_LOCALID")
    local_rank = int(next((os.environ[name] for name in names if name in os.environ), 0))
    return local_rank == 0 or is_distributed()


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether this is how the end of another process of the run looks from here."""
    told = str(error)
    return any(name in told for name in ("gloo", "NCCL", "Connection closed by peer"))


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


def first_cause(error: BaseException) -> str:
    """The message that the wrapping of Hydra or of a data worker hides, in one line.

    With Hydra's note of the key where it happened.
    """
    where = [line for line in str(error).splitlines() if line.startswith("full_key:")]
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    if any(line.startswith("Original Traceback") for line in lines):
        lines = [lines[-1].partition(": ")[2]]
    return " ".join([*lines, *(f"({line})" for line in where)])


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
    folder = f"run_dir={shown_path(run_dir)}"
    if START in os.environ:  # of torchrun or srun, whose own arguments are not known here
        return f"the same command goes on with {folder}"
    given = HydraConfig.get().overrides.task
    kept = [o for o in given if not o.lstrip("+").startswith(("run_dir=", "resume=never"))]
    return f"to go on: {shlex.join(['python', Path(sys.argv[0]).name, *kept, folder])}"


def shown_path(path: Path) -> str:
    """A path as a person here would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def remove_if_empty(run_dir: Path) -> None:
    """Delete the folder that Hydra made for a run, and the folder around it, if they are empty."""
    for folder in (run_dir, run_dir.parent):
        if folder.resolve() != Path.cwd():
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def point_latest(runs_dir: Path, run_dir: Path) -> None:
    """Make `runs_dir / latest` point to this run."""
    runs_dir, run_dir = runs_dir.resolve(), run_dir.resolve()  # a run may be named by `latest`
    with replacing(runs_dir / "latest") as link:
        link.symlink_to(os.path.relpath(run_dir, runs_dir), target_is_directory=True)


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


class Metrics(NamedTuple):
    """figures: keyed `stage/metric`; protocols: how those of a stage were obtained."""

    figures: dict[str, float]
    protocols: dict[str, dict[str, Any]]

    def with_stage(
        self, stage: str, figures: Mapping[str, float], protocol: dict[str, Any]
    ) -> "Metrics":
        """With the figures of one more stage, keyed without its name."""
        keyed = {f"{stage}/{name}": value for name, value in figures.items()}
        return Metrics(self.figures | keyed, self.protocols | {stage: protocol})


def read_metrics(path: Path) -> Metrics:
    """The figures of a run folder so far; none where nothing was written yet.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_figures(path)
    return Metrics({k: v for k, v in content.items() if k != PROTOCOL}, content.get(PROTOCOL, {}))


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Write figures as flat JSON, and the protocols under one more key."""
    with replacing(path) as unfinished:
        content = metrics.figures | {PROTOCOL: metrics.protocols}
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


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


def table(title: str, rows: Mapping[str, object]) -> str:
    """A short two-column table for the end of a job."""
    width = max(len(name) for name in rows)
    lines = [title, "-" * max(len(title), width + 12)]
    return "\n".join(lines + [f"{name:<{width}}  {_cell(value)}" for name, value in rows.items()])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
