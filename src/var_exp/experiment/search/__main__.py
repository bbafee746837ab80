"""Search for the best values of options: Optuna proposes, train.py runs, a final figure decides.

    python -m var_exp.experiment.search 20 FOLDER objective=var/loss \\
        'model.var.optimizer.lr=tag(log, interval(1e-4, 1e-2))' transformer.depth=2,4

The options are overrides of train.py. Those with several values, in Hydra's words `interval(a, b)`,
`int(interval(a, b))`, `range(a, b, step)`, `choice(a, b)` or `a,b`, are searched over;
`tag(log, ...)` takes an interval in the logarithm. Each trial is a run in FOLDER/<number>. A trial
that fails is left out. The same command goes on: with the run that was interrupted, and then with
new values.
"""

from var_exp.distributed.signals import RESUMABLE, Interrupted, SignalHandler, leave

signal_handler = SignalHandler()
if __name__ == "__main__":
    signal_handler.install()  # before the slow imports: a signal may come while they last

import argparse
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from var_exp.distributed.slurm import requeue
from var_exp.experiment.config.overrides import CONF
from var_exp.experiment.search.space import Options, parse
from var_exp.io.lock import locked
from var_exp.io.run_folder import read_metrics
from var_exp.io.text import table

Direction = Literal["minimize", "maximize"]
Run = Callable[[Sequence[str], Path], int]  # overrides and run folder -> exit code


# -- trials ---------------------------------------------------------------------------------


def search(study: optuna.Study, options: Options, folder: Path, num_trials: int, run: Run) -> None:
    """Have so many trials finished; one that was left unfinished is gone on with first.

    Raises:
        ValueError: the run of the unfinished one still goes on, in a process that was left behind.
        Interrupted: this program is asked to stop, and no run is left to finish.
        SystemExit: with 85, where the run was interrupted.
    """
    while True:
        signal_handler.raise_if_received()
        begun = [t for t in study.get_trials() if t.state == TrialState.RUNNING]
        over = [t for t in study.get_trials() if t.state.is_finished()]
        if not begun and len(over) >= num_trials:
            return
        if not begun:
            propose(study, options)
            continue
        trial = begun[0]
        if trial.params.keys() != options.space.keys():  # killed while it was proposed
            fail(study, trial)
            continue
        place = folder / str(trial.number)
        with locked(place, option="FOLDER"):
            pass
        code = run([*options.fixed, *as_overrides(trial)], place)
        if code == RESUMABLE or code and signal_handler.received:
            sys.exit(RESUMABLE)
        value = read_metrics(place / "metrics.json").figures.get(options.objective, math.nan)
        if code == 0 and not math.isnan(value):
            study.tell(trial.number, value)
        else:
            fail(study, trial)


def propose(study: optuna.Study, options: Options) -> None:
    """Begin a trial with a value for each key.

    Its random numbers are its own, so that a search that went on proposes what one that was not
    interrupted does.
    """
    number = len(study.get_trials())
    seed = random.Random(f"{study.user_attrs['seed']} {number}").getrandbits(32)
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    study.ask(options.space)


def fail(study: optuna.Study, trial: FrozenTrial) -> None:
    study.tell(trial.number, state=TrialState.FAIL)
    print(f"search: trial {trial.number} failed and is left out", file=sys.stderr)


def as_overrides(trial: FrozenTrial) -> list[str]:
    return [f"{key}={value}" for key, value in trial.params.items()]


def train(overrides: Sequence[str], run_dir: Path) -> int:
    """Run train.py, and let it know of a signal that asks this program to stop; its exit code."""
    command = [sys.executable, str(CONF.parent / "train.py"), *overrides, f"run_dir={run_dir}"]
    told = False
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if signal_handler.received and not told:
                # A terminal sends its Ctrl-C to both, and after a second one a run does not save.
                keyboard = signal_handler.received == signal.SIGINT
                process.send_signal(signal.SIGTERM if keyboard else signal_handler.received)
                told = True
            time.sleep(0.1)
    return process.returncode


# -- the study ------------------------------------------------------------------------------


def open_study(
    folder: Path, overrides: Sequence[str], direction: Direction, seed: int
) -> optuna.Study:
    """The study in a folder, new or as it was left.

    Raises:
        ValueError: it was begun with other options, whose figures are not comparable.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(
        storage=storage, study_name="search", direction=direction, load_if_exists=True
    )
    now = {"overrides": sorted(overrides), "direction": direction, "seed": seed}
    for name, value in now.items():
        was = study.user_attrs.get(name, value)
        if was != value:
            raise ValueError(
                f"search: {str(folder)!r} was begun with {name} {was}, now {value}; type the same "
                f"command, or choose another folder"
            )
        study.set_user_attr(name, value)
    return study


def summary(study: optuna.Study, options: Options, folder: Path) -> str:
    """The best trials, and how to see more of them.

    Raises:
        ValueError: there is none.
    """
    done = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    if not done:
        raise ValueError(
            f"search: none of {len(study.get_trials())} trials in {str(folder)!r} reached "
            f"{options.objective}; they have said why; choose a new folder for another command"
        )
    done.sort(key=lambda t: t.value or 0.0, reverse=study.direction.name == "MAXIMIZE")
    rows = {
        str(t.number): " ".join([f"{t.value:.4g}", *as_overrides(t), str(folder / str(t.number))])
        for t in done[:5]
    }
    return table(f"{options.objective}: the best of {len(done)} trials", rows)


def main(arguments: Sequence[str], run: Run = train) -> None:
    parser = argparse.ArgumentParser("python -m var_exp.experiment.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("trials", type=int, metavar="TRIALS", help="how many runs in all")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where they and the study go")
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE", help="of train.py")
    parser.add_argument("--maximize", action="store_true", help="more of the objective is better")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals")
    given = parser.parse_args(arguments)
    options = parse(given.overrides)
    direction: Direction = "maximize" if given.maximize else "minimize"
    with locked(given.folder, option="FOLDER"):
        study = open_study(given.folder, given.overrides, direction, given.seed)
        search(study, options, given.folder, given.trials, run)
        print(summary(study, options, given.folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        requeue(stop)  # a run that was interrupted has done it itself
        leave(stop)
    except KeyboardInterrupt:
        sys.exit(RESUMABLE)
    finally:
        signal_handler.finish()
