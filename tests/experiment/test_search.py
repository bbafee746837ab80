"""A search tries values, keeps what it learned, and goes on where it was stopped."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from helpers import command
from helpers.command import QUICK, ROOT
from var_exp.distributed.signals import RESUMABLE, SIGNALS
from var_exp.experiment.search.__main__ import main, open_study
from var_exp.experiment.search.space import parse
from var_exp.io.lock import locked
from var_exp.training.resume import newest_path

LR = "model.var.optimizer.lr=tag(log, interval(1e-4, 1e-2))"
SPACE = [LR, "transformer.depth=choice(2,4)", "seed=range(0,10,2)", "objective=var/loss"]


def states(folder, overrides):
    study = open_study(folder, overrides, "minimize", seed=0)
    return [trial.state.name for trial in study.trials]


class Runs:
    """Stands in for train.py: the loss is best at a small rate and depth 4."""

    def __init__(self, codes=()):
        self.codes, self.seen = list(codes), []

    def __call__(self, overrides, run_dir):
        given = dict(o.split("=") for o in overrides)
        self.seen.append((run_dir.name, given))
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            loss = float(given["model.var.optimizer.lr"]) + (given["transformer.depth"] == "2")
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "metrics.json").write_text(json.dumps({"var/loss": loss}))
        return code


def test_overrides_of_several_values_are_searched_over_and_the_others_stay(tmp_path, capsys):
    runs = Runs()
    main(["12", str(tmp_path), *SPACE, "data=digits"], runs)
    assert [name for name, _ in runs.seen] == [str(i) for i in range(12)]
    for _, given in runs.seen:
        assert given["data"] == "digits" and given["objective"] == "var/loss"
        assert 1e-4 <= float(given["model.var.optimizer.lr"]) <= 1e-2
        assert given["transformer.depth"] in ("2", "4") and given["seed"] in "02468"
    assert len({given["model.var.optimizer.lr"] for _, given in runs.seen}) == 12
    said = capsys.readouterr().out
    deep = [given for _, given in runs.seen if given["transformer.depth"] == "4"]
    best = min(float(given["model.var.optimizer.lr"]) for given in deep)
    assert "the best of 12 trials" in said and f"{best}" in said.splitlines()[2]


def test_a_trial_that_fails_is_left_out_and_the_search_goes_on(tmp_path, capsys):
    runs = Runs([0, 1, 0])
    main(["3", str(tmp_path), *SPACE], runs)
    told = capsys.readouterr()
    assert "trial 1 failed" in told.err and "the best of 2 trials" in told.out


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_an_interrupted_search_finishes_the_trial_that_it_was_at_and_remembers(stop, tmp_path):
    whole, parts = Runs(), Runs([0, RESUMABLE])
    main(["5", str(tmp_path / "whole"), *SPACE], whole)

    def killed(overrides, run_dir):
        code = parts(overrides, run_dir)
        if code and stop is KeyboardInterrupt:
            raise KeyboardInterrupt
        return code

    with pytest.raises(stop):
        main(["5", str(tmp_path / "parts"), *SPACE], killed)
    main(["5", str(tmp_path / "parts"), *SPACE], parts)
    assert [name for name, _ in parts.seen] == ["0", "1", "1", "2", "3", "4"]
    assert parts.seen[:2] + parts.seen[3:] == whole.seen and parts.seen[1] == parts.seen[2]
    assert states(tmp_path / "parts", SPACE) == ["COMPLETE"] * 5


@pytest.mark.parametrize(
    "override, key, kind, values",
    [
        ("a=interval(1, 8)", "a", "Float", dict(low=1.0, high=8.0, step=None, log=False)),
        ("a=int(interval(1, 8))", "a", "Int", dict(low=1, high=8, step=1, log=False)),
        ("a=tag(log, int(interval(1, 8)))", "a", "Int", dict(low=1, high=8, log=True)),
        (LR.replace("model.var.optimizer.lr", "a"), "a", "Float", dict(high=1e-2, log=True)),
        ("a=range(1, 9, 3)", "a", "Int", dict(low=1, high=7, step=3)),
        ("a=range(10, 0, -3)", "a", "Int", dict(low=1, high=10, step=3)),
        ("a=range(0, 1, 0.25)", "a", "Float", dict(low=0.0, high=0.75, step=0.25)),
        ("a=range(0, 0.35, 0.1)", "a", "Float", dict(low=0.0, high=0.3, step=0.1)),
        ("+a=1,2", "+a", "Categorical", dict(choices=("1", "2"))),
        ("++a@b=x,y", "++a@b", "Categorical", dict(choices=("x", "y"))),
        ("a='x y',null,[1,2]", "a", "Categorical", dict(choices=("'x y'", "null", "[1,2]"))),
    ],
)
def test_values_are_those_that_hydra_means(override, key, kind, values):
    ((found, distribution),) = parse([override, "objective=var/loss"]).space.items()
    assert found == key and type(distribution).__name__ == f"{kind}Distribution"
    assert {name: getattr(distribution, name) for name in values} == values


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["b=1"], "nothing to search over"),
        ([LR, "objective="], "objective=METRIC"),
        (["a=interval("], "search: "),
        (["a=interval(2, 1)"], r"a=interval\(2, 1\): .*got 2.0 and 1.0; type"),
        (["a=interval(0, inf)"], "got 0.0 and inf; type"),
        (["a=tag(log, interval(0, 1))"], r"got 0.0 to 1.0; type"),
        (["a=range(5, 5)"], r"a=range\(5, 5\): .*got 5 to 5 in steps of 1; type"),
        (["a=range(1, 5, 0)"], "got 1 to 5 in steps of 0; type"),
        (["a=int(range(0, 1, 0.5))"], "got 0 to 1 in steps of 0; type"),
        (["a=range(0, inf)"], "got 0 to inf in steps of 1; type"),
        (["a=tag(log, range(1, 5))"], "got log; type"),
        (["a=tag(lg, interval(1, 5))"], "got lg; type"),
        (["a=shuffle(1, 2)"], "type choice"),
        (["a=glob(*)"], "type the values"),
        (["a=1,2", "+a=3"], r"got a=1,2 and \+a=3; type one"),
        (["~a=1,2"], "cannot be searched over"),
    ],
)
def test_mistakes_are_one_line_and_begin_no_trial(overrides, named, tmp_path):
    with pytest.raises(ValueError, match=named) as error:
        main(["2", str(tmp_path / "s"), "objective=var/loss", *overrides], Runs())
    assert "\n" not in str(error.value) and not (tmp_path / "s").exists()


def test_a_trial_that_was_never_proposed_whole_is_told_to_optuna_as_failed(tmp_path):
    open_study(tmp_path, SPACE, "minimize", seed=0).ask()  # killed before it had values
    runs = Runs()
    main(["3", str(tmp_path), *SPACE], runs)
    assert [name for name, _ in runs.seen] == ["1", "2"]
    assert states(tmp_path, SPACE) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_another_command_does_not_go_on_with_a_search(tmp_path):
    main(["1", str(tmp_path), *SPACE], Runs())
    for more in (["a=1"], ["--maximize"], ["--seed=1"]):
        with pytest.raises(ValueError, match="was begun with"):
            main(["2", str(tmp_path), *SPACE, *more], Runs())


def test_a_folder_and_a_trial_that_are_in_use_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["1", str(tmp_path), *SPACE], Runs([RESUMABLE]))

    script = (
        "import sys, pathlib; from var_exp.io.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    for folder in (tmp_path, tmp_path / "0"):
        arguments = [sys.executable, "-c", script, folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(arguments, env=environment, **pipes) as holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
                main(["1", str(tmp_path), *SPACE], Runs())
            holder.stdin.close()
    with locked(tmp_path):
        assert states(tmp_path, SPACE) == ["RUNNING"]


def test_a_real_search_ends_with_the_best_run(tmp_path, capsys):
    def run(overrides, run_dir):
        return command.run("train", *overrides, f"run_dir={run_dir}").code

    fixed = [*QUICK, "objective=tokenizer/psnr", "stages=[tokenizer]", f"runs_dir={tmp_path}"]
    rate = "model.tokenizer.optimizer.lr=choice(0.0,3e-3)"
    main(["2", str(tmp_path / "s"), rate, *fixed, "--maximize", "--seed=1"], run)
    figures = [json.loads((tmp_path / f"s/{i}/metrics.json").read_text()) for i in (0, 1)]
    best = max(figure["tokenizer/psnr"] for figure in figures)
    assert capsys.readouterr().out.splitlines()[2].split()[1] == f"{best:.4g}"


# -- the program ----------------------------------------------------------------------------

slow = pytest.mark.slow  # each takes whole runs
REAL = [*QUICK, "objective=tokenizer/l2", "stages=[tokenizer]"]
REAL += ["model.tokenizer.num_batches=12", "model.tokenizer.val_every=6"]
REAL += ["model.tokenizer.optimizer.lr=tag(log, interval(1e-4, 1e-2))"]


def start(folder):
    arguments = [
        sys.executable,
        "-u",
        "-m",
        "var_exp.experiment.search",
        "2",
        "s",
        *REAL,
        "runs_dir=.",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives
    )


def trials(folder):
    study = open_study(folder / "s", [*REAL, "runs_dir=."], "minimize", seed=0)
    return [(trial.state.name, trial.params, trial.value) for trial in study.trials]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    said, _ = start(folder).communicate()
    assert [state for state, _, _ in trials(folder)] == ["COMPLETE"] * 2, said
    return folder


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=slow) for n in (*SIGNALS[1:], "Ctrl-C"))],
    ids=lambda n: getattr(n, "name", n),
)
def test_a_search_that_is_told_to_stop_lets_its_run_save_and_goes_on_exactly(
    number, whole, tmp_path
):
    process = start(tmp_path)
    for line in process.stdout:
        if re.search("tokenizer: batch [2-9]", line):
            break
    if number == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == RESUMABLE and "stopped by SIG" in said, said
    assert "Traceback" not in said
    assert [state for state, _, _ in trials(tmp_path)] == ["RUNNING"]
    assert newest_path(tmp_path / "s/0/tokenizer") is not None
    again = start(tmp_path)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert trials(tmp_path) == trials(whole)
