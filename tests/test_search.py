"""A search tries values, keeps what it learned, and goes on where it was stopped."""

import json

import pytest

import command
from command import QUICK
from var_exp.interruption import RESUMABLE
from var_exp.search import main, open_study, parse

LR = "model.var.module.optimizer.lr=tag(log, interval(1e-4, 1e-2))"
SPACE = [LR, "transformer.depth=choice(2,4)", "seed=range(0,10,2)", "objective=var/loss"]


class Runs:
    """Stands in for train.py: the loss is best at a small rate and depth 4."""

    def __init__(self, codes=()):
        self.codes, self.seen = list(codes), []

    def __call__(self, overrides, run_dir):
        given = dict(o.split("=") for o in overrides)
        self.seen.append((run_dir.name, given))
        code = self.codes.pop(0) if self.codes else 0
        if code == 0:
            loss = float(given["model.var.module.optimizer.lr"]) + (
                given["transformer.depth"] == "2"
            )
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "metrics.json").write_text(json.dumps({"var/loss": loss}))
        return code


def test_overrides_of_several_values_are_searched_over_and_the_others_stay(tmp_path, capsys):
    runs = Runs()
    main(["12", str(tmp_path), *SPACE, "data=digits"], runs)
    assert [name for name, _ in runs.seen] == [str(i) for i in range(12)]
    for _, given in runs.seen:
        assert given["data"] == "digits" and given["objective"] == "var/loss"
        assert 1e-4 <= float(given["model.var.module.optimizer.lr"]) <= 1e-2
        assert given["transformer.depth"] in ("2", "4") and given["seed"] in "02468"
    assert len({given["model.var.module.optimizer.lr"] for _, given in runs.seen}) == 12
    said = capsys.readouterr().out
    deep = [given for _, given in runs.seen if given["transformer.depth"] == "4"]
    best = min(float(given["model.var.module.optimizer.lr"]) for given in deep)
    assert "the best of 12 trials" in said and f"lr={best}" in said.splitlines()[2]


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
    assert parts.seen[1] == parts.seen[2] and parts.seen[:2] == whole.seen[:2]
    study = open_study(tmp_path / "parts", "minimize", seed=0)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 5


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["objective=var/loss"], "nothing to search over"),
        ([LR], "objective=METRIC"),
        (["a=interval(", "objective=var/loss"], "search: "),
    ],
)
def test_mistakes_are_one_line(overrides, named):
    with pytest.raises(ValueError, match=named) as error:
        parse(overrides)
    assert "\n" not in str(error.value)


def test_a_real_search_ends_with_the_best_run(tmp_path, capsys):
    def run(overrides, run_dir):
        return command.run("train", *overrides, f"run_dir={run_dir}").code

    fixed = [*QUICK, "objective=tokenizer/psnr", "stages=[tokenizer]", f"runs_dir={tmp_path}"]
    rate = "model.tokenizer.module.optimizer.lr=choice(0.0,3e-3)"
    main(["2", str(tmp_path / "s"), rate, *fixed, "--maximize", "--seed=1"], run)
    figures = [json.loads((tmp_path / f"s/{i}/metrics.json").read_text()) for i in (0, 1)]
    best = max(figure["tokenizer/psnr"] for figure in figures)
    assert capsys.readouterr().out.splitlines()[2].startswith(f"{best:.4g}")
