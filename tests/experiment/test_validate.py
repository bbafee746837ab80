"""A value of another type is refused by its key, in whatever part, before anything is built."""

import dataclasses

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from helpers.command import CONF, composed
from tests.experiment.test_bad_input import refused_run
from var_exp.experiment.config.overrides import check_groups
from var_exp.experiment.config.schema import SampleConfig, TrainConfig
from var_exp.experiment.config.validate import check_types

GROUPS = ("data", "adversary", "tokenizer", "transformer", "trainer", "logger", "evaluation")


@pytest.mark.parametrize("choice", [f"{g}={p.stem}" for g in GROUPS for p in (CONF / g).iterdir()])
def test_every_part_that_is_there_to_choose_has_values_of_its_types(choice):
    check_types(composed("train", choice))


@pytest.mark.parametrize(
    "override", ["trainer=0", "adversary=7", "data=null", "logger=true", "callbacks=null"]
)
def test_a_choice_of_a_group_that_is_no_name_is_refused_with_the_names(override):
    group, _, value = override.partition("=")
    names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
    with pytest.raises(SystemExit, match=f"^error: {group}: expected one of {names}, got {value}$"):
        check_groups(["seed=1", override])


def test_choices_that_are_names_or_none_are_left_to_hydra():
    names = ["trainer=cpu", "trainer=cpu,gpu", "~logger", "hydra/launcher=null", "seed=0"]
    check_groups([*names, "trainer={devices:2}", "callbacks@callbacks.var=null", "-m"])


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("model.tokenizer.clip", "abc", "expected a number, got 'abc'"),
        ("model.tokenizer.clip", float("nan"), "expected a number, got nan"),
        ("model.var.batch_size", 1.5, "expected a whole number, got 1.5"),
        ("model.var.batch_size", True, "expected a whole number, got true"),
        ("model.var.scale_weights", 4, "expected a list or null, got 4"),
        ("model.var.scaling_law", "yes", "expected true or false, got 'yes'"),
        ("model.var.optimizer.betas", [0.9], "expected a longer list, got [0.9]"),
        ("model.var.progressive", {"first": 2}, "_target_: ...} that gives a Progressive"),
        ("model.tokenizer.loss._target_", "var_exp.data.Digits", "ReconstructionLoss"),
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


def changed(program, *overrides):
    """The composition of a program with some values changed, which is quicker than Hydra."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(program)))
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_delete():
            where, _, name = override.key_or_group.rpartition(".")
            del OmegaConf.select(cfg, where)[name]
        else:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
    return cfg


NONSENSE = {
    "train": [
        *("model.var.schedule.warmup=5", "model.var.schedule.warmup=-1"),
        *("model.var.schedule.final=-3", "+model.var.schedule.hold=7"),
        *("model.tokenizer.loss.l1=-1", "model.tokenizer.loss.codebook=-1"),
        *("model.var.class_dropout_prob=1", "model.var.batch_size=1000000000"),
        *("transformer.dropout=1", "transformer.drop_path=2", "transformer.softmax_scale=0"),
        *("transformer.mlp_ratio=0", "tokenizer.encoder.width=0", "tokenizer.encoder.patch_size=0"),
        *("tokenizer.encoder.multipliers=[]", "tokenizer.quantizer.entropy_temperature=0"),
        *("evaluation.num_reference=0", "evaluation.num_samples_per_scale=1"),
        *("evaluation.num_reconstructions_val=0", "callbacks.var.pictures.num_per_class=0"),
        *("datamodule.num_workers=100000", "datamodule.val_batch_size=0", "datamodule.prefetch=0"),
        *("sampling.temperature=1e300", "sampling.temperature=1e-40", "sampling.top_p=1e-300"),
        *("sampling.cfg_scale=1e40", "callbacks.var=null", "expected={var/loss:[1]}"),
        *("+banana=1", "+evaluation.banana=1", "+trainer.banana=1", "~evaluation.num_reference"),
        *("seed=false", "seed='3'", "num_threads=1.0", "transformer.rope=1", "data.seed=-1"),
    ],
    "sample": [
        *("device=meta", "top_p=1e-300", "cfg_scale=1e40", "temperature=1e-40", "top_k=false"),
        *("devices=0", "compile=banana", "weights=best", "num_samples=-1", "+banana=1"),
    ],
}


@pytest.mark.parametrize(
    "program, override", [(program, o) for program, all_ in NONSENSE.items() for o in all_]
)
def test_nonsense_is_refused_in_one_line_that_names_key_and_value(program, override):
    with pytest.raises(ValueError) as refused:
        check_types(changed(program, override))
    key, _, value = override.lstrip("+~").partition("=")
    told = str(refused.value)
    assert key in told and "\n" not in told
    assert "no such" in told or "missing" in told or told.split(", got ")[1]


def test_a_key_of_the_users_own_is_taken_where_other_values_refer_to_it():
    check_types(changed("train", "+rate=1e-3", "model.var.optimizer.lr=${rate}"))
    check_types(changed("train", "+mine.rate=1e-3", "model.var.clip=${mine.rate}"))
    with pytest.raises(ValueError, match="rate: there is no such key"):
        check_types(changed("train", "+rate=1e-3", "model.var.optimizer.lr=1e-3"))


@pytest.mark.parametrize(
    "override",
    [
        "+callbacks.var.mine={_target_:lightning.pytorch.callbacks.Timer}",
        "+logger.mine={_target_:lightning.pytorch.loggers.CSVLogger,_partial_:true}",
        "+trainer.max_time='00:01:00:00'",
        "+tokenizer.quantizer.beta=0.5",
        "trainer.devices=[0,1]",
        "data.image_size=[16,32]",
        "run_dir=2024",
    ],
)
def test_what_users_add_is_taken_where_something_takes_it(override):
    check_types(changed("train", override))


@pytest.mark.parametrize("program, schema", [("train", TrainConfig), ("sample", SampleConfig)])
def test_the_schema_has_the_very_keys_of_the_files_and_a_sentence_for_each(program, schema):
    def compare(fields, tree, key=""):
        assert {f.name for f in fields} == {name for name in tree if name != "hydra"}
        for field in fields:
            if dataclasses.is_dataclass(field.type):
                assert field.type.__doc__.endswith(".")
                compare(dataclasses.fields(field.type), tree[field.name])
            else:
                assert field.metadata["doc"].endswith(".")

    compare(dataclasses.fields(schema), composed(program))


def test_a_value_that_is_written_elsewhere_is_named_by_both_keys():
    cfg = OmegaConf.create(OmegaConf.to_container(composed("train"), resolve=False))
    cfg.mine = "yes"
    cfg.callbacks.tokenizer.scores.num_images = "${mine}"
    told = r"^callbacks.tokenizer.scores.num_images = \$\{mine\}: "
    with pytest.raises(ValueError, match=told):
        check_types(cfg)


def test_all_wrong_values_are_named_at_once_and_not_what_is_taken_from_them():
    with pytest.raises(ValueError) as refused:
        check_types(changed("train", "evaluation.num_samples_val=1", "transformer.dropout=1"))
    first, second = str(refused.value).split("; ")
    assert {first.partition(":")[0], second.partition(":")[0]} == {
        "evaluation.num_samples_val",
        "transformer.dropout",
    }


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.var.clip=abc", ["model.var.clip", "'abc'"]),
        ("+model.var.clp=1", ["model.var.clp", "the nearest is 'clip'"]),
        ("~model.var.optimizer", ["'optimizer'"]),
        ("model.var.optimizer.lr=-1", ["model.var.optimizer", "-1"]),
        ("trainer.devices=0", ["trainer: ", "devices=0"]),
        ("model.tokenizer.freeze=[encoder]", ["freeze", "init_from=PATH"]),
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
        ("model.tokenizer.loss={_target_:nowhere.at}", ["tokenizer.loss", "nowhere.at"]),
        ("~callbacks.tokenizer.scores.num_images", ["callbacks.tokenizer.scores", "'num_images'"]),
        ("callbacks.var.scores.every_n_batches=-1", ["callbacks.var.scores.every_n_batches", "-1"]),
        ("evaluation.every_n_epochs=0", ["evaluation.every_n_epochs", "0"]),
        ("tokens.dir=/proc/x", ["tokens.dir", "'/proc'"]),
        ("evaluation.reference=a/b", ["evaluation.reference", "a/b"]),
        ("~evaluation.num_reference", ["num_reference"]),
        ("transformer.depth=100000000", ["transformer.depth", "1000"]),
        ("transformer.width=100000000000", ["memory is full", "batch_size"]),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_one_line(override, named, tmp_path):
    refused_run(tmp_path, [override], *named)
