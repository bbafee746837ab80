"""A value of another type is refused by its key, in whatever part, before anything is built."""

import pytest
from omegaconf import OmegaConf

from helpers.command import CONF, composed
from tests.experiment.test_bad_input import refused_run
from var_exp.experiment.config.overrides import check_groups
from var_exp.experiment.config.validate import check_types

GROUPS = ("data", "adversary", "tokenizer", "transformer", "trainer", "logger", "evaluation")


@pytest.mark.parametrize("choice", [f"{g}={p.stem}" for g in GROUPS for p in (CONF / g).iterdir()])
def test_every_part_that_is_there_to_choose_has_values_of_its_types(choice):
    check_types(composed("train", choice))


@pytest.mark.parametrize("override", ["trainer=0", "adversary=7", "data=null", "logger=true"])
def test_a_choice_of_a_group_that_is_no_name_is_refused_with_the_names(override):
    group, _, value = override.partition("=")
    names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    with pytest.raises(SystemExit, match=f"^error: {group}: expected one of {names}, got {value}$"):
        check_groups(["seed=1", override])


def test_choices_that_are_names_or_none_are_left_to_hydra():
    names = ["trainer=cpu", "trainer=cpu,gpu", "~logger", "hydra/launcher=null", "seed=0"]
    check_groups([*names, "trainer={devices:2}", "-m"])


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("model.tokenizer.module.clip", "abc", "expected a number, got 'abc'"),
        ("model.tokenizer.module.clip", float("nan"), "expected a number, got nan"),
        ("model.var.batch_size", 1.5, "expected a whole number, got 1.5"),
        ("model.var.batch_size", True, "expected a whole number, got true"),
        ("model.var.module.scale_weights", 4, "expected a list or null, got 4"),
        ("model.var.module.scaling_law", "yes", "expected true or false, got 'yes'"),
        ("model.var.module.optimizer.betas", [0.9], "expected a longer list, got [0.9]"),
        ("model.var.module.progressive", {"first": 2}, "_target_: ...} that gives a Progressive"),
        ("model.tokenizer.module.loss._target_", "var_exp.data.Digits", "ReconstructionLoss"),
        ("transformer.depth", None, "expected a whole number, got null"),
        ("transformer._target_", "var_exp.nowhere", "there is no 'var_exp.nowhere'"),
        ("callbacks.var.report", 7, "_target_"),
        ("tokenizer", None, "got null"),
        ("seed", 10**20, "expected a number < 9.2"),
        ("sampling", {"topk": 1}, "sampling.topk: there is no such key; the nearest is 'top_k'"),
        ("evaluation.scores.first", 2, "evaluation.scores.first: there is no such key"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(key, value, named):
    cfg = OmegaConf.create(OmegaConf.to_container(composed("train")))
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ValueError) as refused:
        check_types(cfg)
    told = str(refused.value)
    assert told.startswith(key.removesuffix("._target_")) and named in told and "\n" not in told


def test_a_value_that_is_written_elsewhere_is_named_by_both_keys():
    cfg = OmegaConf.create(OmegaConf.to_container(composed("train"), resolve=False))
    cfg.evaluation.num_reconstructions_val = "yes"
    told = r"callbacks.tokenizer.scores.num_images = \$\{evaluation.num_reconstructions_val\}: "
    with pytest.raises(ValueError, match=told):
        check_types(cfg)


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.var.module.clip=abc", ["model.var.module.clip", "'abc'"]),
        ("+model.var.module.clp=1", ["model.var.module.clp", "the nearest is 'clip'"]),
        ("~model.var.module.optimizer", ["'optimizer'"]),
        ("model.var.module.optimizer.lr=-1", ["model.var.module.optimizer", "-1"]),
        ("trainer.devices=0", ["trainer: ", "devices=0"]),
        ("model.tokenizer.module.freeze=[encoder]", ["freeze", "init_from=PATH"]),
        ("num_threads=1000000000000", ["num_threads", "1000000000000"]),
        ("trainer.devices=abc", ["trainer.devices"]),
        ("trainer._target_=builtins.dict", ["trainer._target_", "dict"]),
        ("evaluation.scores.kid_subset_size=-1", ["evaluation.scores.kid_subset_size", "-1"]),
        ("num_threads=100000", ["num_threads", "100000"]),
        ("evaluation.num_samples=${nothing}", ["evaluation.num_samples: ", "'nothing' not found"]),
        ("callbacks.var.report={_target_:builtins.dict}", ["callbacks.var.report", "dict"]),
        ("callbacks.var.scores={_target_:builtins.dict}", ["callbacks.var.scores", "dict"]),
        ("evaluation.network={_target_:builtins.dict}", ["evaluation.network"]),
        ("evaluation.network={_target_:var_exp.data.Digits}", ["evaluation.network"]),
        ("evaluation.scores.seed=-1", ["evaluation.scores.seed", "-1"]),
        ("model.tokenizer.module.loss={_target_:nowhere.at}", ["module.loss", "nowhere.at"]),
        ("~callbacks.tokenizer.scores.num_images", ["callbacks.tokenizer.scores", "'num_images'"]),
        ("callbacks.var.scores.every_n_batches=-1", ["callbacks.var.scores.every_n_batches", "-1"]),
        ("evaluation.every_n_epochs=0", ["evaluation.every_n_epochs", "0"]),
        ("evaluation.reference=a/b", ["evaluation.reference", "a/b"]),
        ("~evaluation.num_reference", ["num_reference"]),
        ("transformer.depth=100000000", ["transformer.depth", "1000"]),
        ("transformer.width=100000000000", ["memory is full", "batch_size"]),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_one_line(override, named, tmp_path):
    refused_run(tmp_path, [override], *named)
