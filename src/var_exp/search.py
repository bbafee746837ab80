"""Search for the best values of options: Optuna proposes, train.py runs, a final figure decides.

    python -m var_exp.search 20 FOLDER objective=var/loss \\
        'model.var.module.optimizer.lr=tag(log, interval(1e-4, 1e-2))' transformer.depth=2,4

The options are overrides of train.py. Those with several values, in Hydra's words `interval(a, b)`,
`range(a, b, step)`, `choice(a, b)` or `a,b`, are searched over; `tag(log, ...)` takes steps in the
logarithm. Each trial is a run in FOLDER/<number>. A trial that fails is left out. The same command
goes on: it finishes the runs that were interrupted, and then tries new values.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from var_exp.cli import CONF, read_metrics, table
from var_exp.interruption import RESUMABLE

Run = Callable[[Sequence[str], Path], int]  # overrides and run folder -> exit code


class Options(NamedTuple):
    """What is searched over, by key, and the overrides that stay."""

    space: dict[str, Override]
    fixed: list[str]

    @property
    def objective(self) -> str:
        """The figure that decides."""
        chosen = [o.partition("=")[2] for o in self.fixed if o.startswith("objective=")]
        return chosen[-1] if chosen else ""


def parse(overrides: Sequence[str]) -> Options:
    """Divide overrides.

    Raises:
        ValueError: one that Hydra does not understand, nothing to search over, no objective.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(f"search: {' '.join(str(error).split())}") from None
    searched = {o.key_or_group: o for o in parsed if o.is_sweep_override()}
    options = Options(searched, [o.input_line for o in parsed if not o.is_sweep_override()])
    if not options.space:
        raise ValueError(
            "search: nothing to search over; expected an override with several values, such as "
            "'model.var.module.optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
        )
    if not options.objective:
        raise ValueError("search: expected objective=METRIC, such as objective=var/loss")
    return options


def propose(trial: Trial, space: dict[str, Override]) -> None:
    """Let a trial take a value of each key."""
    for key, override in space.items():
        values = override.value()
        log = "log" in getattr(values, "tags", ())
        if isinstance(values, IntervalSweep):
            trial.suggest_float(key, values.start, values.end, log=log)
        elif isinstance(values, RangeSweep):
            suggest = trial.suggest_int if isinstance(values.start, int) else trial.suggest_float
            # Hydra's ranges, as Python's, are without their end.
            suggest(key, values.start, values.stop - values.step, step=values.step)
        else:
            trial.suggest_categorical(key, [str(value) for value in override.sweep_iterator()])


def search(study: optuna.Study, options: Options, folder: Path, num_trials: int, run: Run) -> None:
    """Have so many trials finished; those that were left unfinished are gone on with first."""
    while True:
        begun = [t for t in study.get_trials() if t.state == TrialState.RUNNING]
        over = [t for t in study.get_trials() if t.state.is_finished()]
        if not begun and len(over) >= num_trials:
            return
        if not begun:
            propose(study.ask(), options.space)
            continue
        trial = begun[0]
        place = folder / str(trial.number)
        code = run([*options.fixed, *as_overrides(trial)], place)
        if code == RESUMABLE:
            sys.exit(RESUMABLE)
        value = read_metrics(place / "metrics.json").figures.get(options.objective)
        if code == 0 and value is not None:
            study.tell(trial.number, value)
        else:
            study.tell(trial.number, state=TrialState.FAIL)
            print(f"search: trial {trial.number} failed and is left out", file=sys.stderr)


def as_overrides(trial: Trial | FrozenTrial) -> list[str]:
    return [f"{key}={value}" for key, value in trial.params.items()]


def train(overrides: Sequence[str], run_dir: Path) -> int:
    """Run train.py; its exit code."""
    command = [sys.executable, str(CONF.parent / "train.py"), *overrides, f"run_dir={run_dir}"]
    return subprocess.run(command).returncode


def open_study(folder: Path, direction: str, seed: int) -> optuna.Study:
    """The study in a folder, new or as it was left."""
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    sampler = optuna.samplers.TPESampler(seed=seed)
    options = {"direction": direction, "sampler": sampler, "load_if_exists": True}
    return optuna.create_study(storage=storage, study_name="search", **options)


def summary(study: optuna.Study, options: Options, folder: Path) -> str:
    """The best trials, and how to see more of them."""
    done = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    if not done:
        return f"search: no trial was finished, see {folder}"
    done.sort(key=lambda t: t.value, reverse=study.direction.name == "MAXIMIZE")
    rows = {}
    for trial in done[:5]:
        rows[f"{trial.value:.4g}"] = " ".join(
            [*as_overrides(trial), str(folder / str(trial.number))]
        )
    return table(f"{options.objective}: the best of {len(done)} trials", rows)


def main(arguments: Sequence[str], run: Run = train) -> None:
    parser = argparse.ArgumentParser("python -m var_exp.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("trials", type=int, metavar="TRIALS", help="how many runs in all")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they and the study go")
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="of train.py")
    parser.add_argument("--maximize", action="store_true", help="more of the objective is better")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals")
    given = parser.parse_args(arguments)
    options = parse(given.overrides)
    study = open_study(given.folder, "maximize" if given.maximize else "minimize", given.seed)
    search(study, options, given.folder, given.trials, run)
    print(summary(study, options, given.folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(RESUMABLE)
