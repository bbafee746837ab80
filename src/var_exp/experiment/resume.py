"""What changed since a run was started, when it is to go on: its configuration and its code.

Going on means that the run ends as if it had never stopped. So what decides on weights, data and
schedules of a stage that is not over must be as it was; what only decides on speed, on where
things are written, or on what is looked at may change, and is told. So is the number of processes
or of micro-batches: they train the same, but dropout and dropped labels are drawn otherwise; and
how blocks are computed, which rounds otherwise.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from var_exp.distributed.launch import is_started_again, name_of_start
from var_exp.experiment.config.overrides import with_current_names
from var_exp.experiment.config.plain import plain
from var_exp.experiment.errors import first_cause
from var_exp.io.environment import environment
from var_exp.io.files import atomic_write

# Of the configuration, what does not change what is trained, by the beginning of the key.
FREE = (
    *(
        "check",
        "resume",
        "run_dir",
        "runs_dir",
        "objective",
        "expected",
        "name",
        "stages",
    ),
    *("logger", "callbacks", "evaluation", "sampling", "tokenizer_ckpt", "init_from"),
    *("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"),
    *("trainer.log_every_n_steps", "trainer.enable_model_summary"),
    *("datamodule.num_workers", "datamodule.pin_memory", "datamodule.prefetch"),
    *("datamodule.val_batch_size", "num_threads", "data.root"),
    "tokens",  # how many views there are is in the plan of the stage, see `fit_stage`
)
# Of a stage, by the end of the key.
FREE_OF_A_STAGE = (
    *(".save_every", ".micro_batch_size", ".weights"),
    *(".activation_checkpointing", ".attention", ".compile"),
)
# What only one stage is trained with.
OWN = {
    "tokenizer": ("model.tokenizer", "adversary", "tokenizer"),
    "var": ("model.var", "transformer"),
}

CONFIG = ".hydra/config.yaml"  # in a run folder: the configuration it was started with
MISSING = "(nothing)"  # the value of a key that was not there
RESTARTED = ".anew"  # in a run folder: the start of a job that started over


class Change(NamedTuple):
    """A dotted key, what it was, and what it is."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {self.was} -> {self.now}"


def changes(was: Any, now: Any, key: str = "") -> Iterator[Change]:
    """Where two trees of plain data differ."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in {**was, **now}:
            before = was.get(name, MISSING)
            yield from changes(before, now.get(name), f"{key}.{name}" if key else str(name))
    elif was != now and (was, now) != (MISSING, None):
        yield Change(key, was, now)


def check_changes(
    run_dir: Path,
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    begun: Sequence[str],
    same_code: bool = True,
) -> list[Change]:
    """What is different in a run's configuration.

    Args:
        begun: the stages that there are checkpoints of; what another stage is trained with may
            change.
        same_code: as when the run was started; other code may know of more keys.

    Raises:
        ValueError: something that would break the continuation; all of it is named.
    """
    found = list(changes(was, now))
    known = [change for change in found if same_code or change.was is not MISSING]
    if broken := [change for change in known if not is_free(change.key, begun)]:
        raise ValueError(
            f"resume: the run in {str(run_dir)!r} was started with other values that decide on "
            f"what is trained: {'; '.join(map(str, broken))}; keep them, or begin a new run folder "
            f"where this one is (resume={run_dir} with a new run_dir), or start over (resume=never)"
        )
    return found


def changed_code(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What is different in the code that runs: commits and versions of `environment()`."""
    return [c for c in changes(was, now) if c.key.startswith(("versions", "git", "python"))]


def is_free(key: str, begun: Sequence[str]) -> bool:
    """Whether a run may go on with another value of this key."""
    if key.startswith("model.") and key.endswith(FREE_OF_A_STAGE):
        return True
    others = [key for stage, keys in OWN.items() if stage not in begun for key in keys]
    return any(key == name or key.startswith(f"{name}.") for name in (*FREE, *others))


# -- a job that started over and is started again -----------------------------------------------


def mark_restarted(run_dir: Path) -> None:
    """Note that this job has deleted what it was to begin without."""
    (run_dir / RESTARTED).write_text(name_of_start() or "")


def has_restarted(run_dir: Path) -> bool:
    """Whether this is another start of the job that started a run folder over: now it resumes."""
    path = run_dir / RESTARTED
    return is_started_again() and path.exists() and path.read_text() == name_of_start()


# -- the record of a run ----------------------------------------------------------------


def write_record(config: DictConfig, run_dir: Path) -> None:
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
    with atomic_write(run_dir / "environment.json") as unfinished:
        unfinished.write_text(json.dumps(environment(), indent=2) + "\n")


def read_record(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and the environment that a run was started with, as plain data.

    Raises:
        ValueError: they are missing, or cannot be read.
    """
    path = run_dir / ".hydra" / "config.yaml"
    try:
        config = plain(OmegaConf.load(path))
        return with_current_names(config), json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"resume: {str(run_dir)!r} has checkpoints, but not what they were trained with ("
            f"{first_cause(error)}); begin a new run folder where this one is (resume={run_dir} "
            f"with a new run_dir), or start over (resume=never)"
        ) from None
