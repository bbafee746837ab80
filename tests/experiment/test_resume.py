"""What may differ when a run goes on, and when a job that started over goes on instead."""

import pytest

from var_exp.experiment.resume import MISSING, Change, check_changes, has_restarted, mark_restarted

WAS = {
    "seed": 0,
    "trainer": {"devices": 2, "precision": "32-true"},
    "model": {"var": {"lr": 1e-3, "save_every": None}, "tokenizer": {"lr": 2e-3}},
    "transformer": {"depth": 2, "dropout": None},
}


def changed(key, value):
    """The configuration with another value under a dotted key."""
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in WAS.items()}
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        node[name] = dict(node[name])
        node = node[name]
    node[last] = value
    return tree


def with_module(**options):
    """The configuration with these options of the module of stage two."""
    return changed("model.var", options)


def found(now, begun=("tokenizer", "var"), same_code=True):
    return check_changes("runs/x", WAS, now, begun, same_code)


@pytest.mark.parametrize(
    "name, value, other",
    [
        ("activation_checkpointing", 0.0, 1.0),
        ("attention", "mask", "flex"),
        ("compile", False, True),
    ],
)
def test_how_blocks_are_computed_may_change_and_is_told(name, value, other):
    was, now = with_module(**{name: value}), with_module(**{name: other})
    (change,) = check_changes("runs/x", was, now, ("var",), True)
    assert str(change) == f"model.var.{name} {value} -> {other}"


@pytest.mark.parametrize("key, value", [("trainer.devices", 4), ("model.var.save_every", 9)])
def test_what_decides_on_no_weight_is_told(key, value):
    assert [change.key for change in found(changed(key, value))] == [key]


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("model.var.lr", 0.1),
        ("transformer.dropout", 0.1),  # that was null
        ("trainer.gradient_clip_val", 1),  # that was not there
        ("model.var.schedule", {"weight": 2}),
    ],
)
def test_what_decides_on_the_weights_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"resume: .*{key} .* -> ") as refused:
        found(changed(key, value))
    assert "\n" not in str(refused.value)


def test_what_went_away_is_refused():
    now = changed("model.var.lr", None)
    del now["model"]["var"]["lr"]
    with pytest.raises(ValueError, match=r"model\.var\.lr 0\.001 -> None"):
        found(now)


def test_other_code_may_know_of_more_keys_and_they_are_told():
    now = changed("model.var.eps", 1e-6)
    assert found(now, same_code=False) == [Change("model.var.eps", MISSING, 1e-6)]
    with pytest.raises(ValueError, match="model.var.lr"):
        found(changed("model.var.lr", 1), same_code=False)


def test_a_key_that_is_new_and_null_is_no_change():
    assert found(changed("model.var.eps", None)) == []


def test_what_a_stage_that_has_not_begun_is_trained_with_may_change():
    assert found(changed("transformer.depth", 3), begun=["tokenizer"])
    with pytest.raises(ValueError, match="model.tokenizer.lr"):
        found(changed("model.tokenizer.lr", 1), begun=["tokenizer"])


@pytest.mark.parametrize("counter", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_that_began_anew_goes_on_when_it_is_started_again(counter, tmp_path, monkeypatch):
    monkeypatch.delenv("VAR_EXP_START", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not has_restarted(tmp_path)
    mark_restarted(tmp_path)
    assert not has_restarted(tmp_path)  # the same shell, asked once more
    monkeypatch.setenv(counter, "1")
    assert has_restarted(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not has_restarted(tmp_path)


def test_a_job_that_was_stopped_before_it_began_anew_still_does(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not has_restarted(tmp_path)
