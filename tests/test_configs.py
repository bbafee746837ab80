"""Every YAML under conf/ composes into the programs' configurations, and what it describes can be
built. The files are found, not listed: a new one is covered by being there."""

from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

import train
from command import composed, run
from var_exp.cli import CONF
from var_exp.data import ImageDataModule, ImageSource
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE
from var_exp.training.stage import StageModule
from var_exp.transformer import VAR

STAGES = ("tokenizer", "var")
PROGRAMS = ("train", "sample")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def every(group: str):
    """Parametrise over the files of a group."""
    return pytest.mark.parametrize("name", options(group))


def stage_of(name: str) -> str:
    """The files of model/ and callbacks/ are named after their stage: `var`, `var_fast`."""
    return name.partition("_")[0]


def override(group: str, name: str) -> str:
    """How a file is chosen on the command line."""
    staged = group in ("model", "callbacks")
    return f"{group}@{group}.{stage_of(name)}={name}" if staged else f"{group}={name}"


def resolved(cfg: DictConfig) -> dict:
    """The configuration of the program, every reference in it followed."""
    ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(ours, resolve=True)


def source_of(cfg: DictConfig) -> ImageSource:
    return instantiate(cfg.data, _convert_="all")


def build_networks(cfg: DictConfig) -> dict[str, StageModule]:
    """Tokenizer, transformer and the modules of both stages, as train.py makes them."""
    with torch.device("meta"):  # whatever their size
        source = source_of(cfg)
        tokenizer = train.make_tokenizer(cfg, source, Path("nowhere"))
        return train.make_modules(cfg, source, tokenizer)


FILES = [
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF
]


@pytest.mark.parametrize("group, name", FILES, ids=lambda value: value)
def test_every_file_composes_and_resolves(group, name):
    cfg = composed("train", override(group, name))
    assert resolved(cfg)
    chosen = {v for k, v in cfg.hydra.runtime.choices.items() if k.partition("@")[0] == group}
    assert name in chosen


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_compose(program):
    cfg = composed(program, *(["ckpt=x"] if program == "sample" else []))
    assert resolved(cfg)
    assert {path.stem for path in CONF.glob("*.yaml")} == set(PROGRAMS)


def test_the_main_job_is_the_digits_and_its_networks_fit():
    cfg = composed("train")
    assert cfg.name == "digits" and list(cfg.stages) == list(STAGES)
    modules = build_networks(cfg)
    assert list(modules) == list(STAGES)
    assert modules["var"].tokenizer is modules["tokenizer"].tokenizer
    assert modules["var"].transformer.num_classes == 10


@every("scales")
def test_every_schedule_grows(name):
    cfg = composed("train", f"scales={name}")
    assert ScaleSchedule(cfg.scales.patch_nums).seq_len > 0


@every("tokenizer")
@pytest.mark.parametrize("channels", [1, 3])
def test_every_tokenizer_is_built(name, channels):
    cfg = composed("train", f"tokenizer={name}")
    sizes = {"encoder": {"in_channels": channels}, "decoder": {"out_channels": channels}}
    with torch.device("meta"):
        network = instantiate(cfg.tokenizer, **sizes, _convert_="all")
    assert isinstance(network, VQVAE)
    assert network.schedule == ScaleSchedule(cfg.scales.patch_nums)


@every("transformer")
@pytest.mark.parametrize("num_classes", [0, 1000])
def test_every_transformer_is_built(name, num_classes):
    cfg = composed("train", f"transformer={name}", "scales=var_256")
    values = {"vocab_size": 4096, "code_dim": 32, "num_classes": num_classes}
    with torch.device("meta"):
        network = instantiate(cfg.transformer, **values, _convert_="all")
    assert isinstance(network, VAR) and network.num_classes == num_classes
    assert network.schedule == ScaleSchedule(cfg.scales.patch_nums)


@pytest.mark.parametrize(
    "name, width, num_heads, millions",
    [
        ("d16", 1024, 16, 310),
        ("d20", 1280, 20, 600),
        ("d24", 1536, 24, 1000),
        ("d30", 1920, 30, 2000),
    ],
)
def test_the_papers_sizes_have_the_papers_parameters(name, width, num_heads, millions):
    cfg = composed("train", f"transformer={name}", "scales=var_256")
    values = {"vocab_size": 4096, "code_dim": 32, "num_classes": 1000}
    with torch.device("meta"):
        network = instantiate(cfg.transformer, **values, _convert_="all")
    assert (network.width, network.num_heads) == (width, num_heads)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@every("model")
def test_every_way_to_optimise_a_stage_makes_its_module(name):
    cfg = composed("train", override("model", name))
    module = build_networks(cfg)[stage_of(name)]
    model = cfg.model[stage_of(name)]
    assert module.stage == stage_of(name)
    assert min(model.batch_size, model.num_batches, model.val_every) >= 1
    module.make_optimizer([nn.Parameter(torch.zeros(2))])
    assert all(0 <= module.schedule(progress) <= 1 for progress in (0.0, 0.01, 0.5, 0.999))


@every("data")
def test_every_set_of_images_is_described_without_its_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composed("train", f"data={name}")
    source = source_of(cfg)
    data = instantiate(cfg.datamodule, _partial_=True)(source)
    assert isinstance(source, ImageSource) and isinstance(data, ImageDataModule)
    assert source.name == name == cfg.name
    assert not list(tmp_path.iterdir())


@every("data")
def test_every_set_of_images_picks_its_recipe_and_gets_networks_that_fit(name):
    cfg = composed("train", f"data={name}")
    assert cfg.hydra.runtime.choices.recipe == name
    modules = build_networks(cfg)
    source, tokenizer = source_of(cfg), modules["tokenizer"].tokenizer
    tokenizer.schedule.check_image(source.image_size, tokenizer.encoder.stride)
    assert tokenizer.encoder.spec["in_channels"] == source.channels
    assert modules["var"].transformer.num_classes == source.num_classes


def test_every_recipe_is_one_of_a_set_of_images():
    assert options("recipe") == options("data")


@every("recipe")
def test_a_recipe_can_be_had_without_its_images(name):
    cfg = composed("train", f"recipe={name}")
    assert cfg.name == "digits" and cfg.hydra.runtime.choices.recipe == name


@every("trainer")
def test_every_trainer_is_built(name):
    cfg = composed("train", f"trainer={name}")
    here = {"accelerator": "cpu", "devices": 1}  # there may be no GPU
    trainer = instantiate(cfg.trainer, **here, _partial_=True)(logger=False)
    assert isinstance(trainer, L.Trainer)


@every("logger")
def test_every_logger_is_built_for_a_run_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = composed("train", f"logger={name}")
    assert cfg.logger
    for entry in cfg.logger.values():
        assert isinstance(instantiate(entry)(save_dir=str(tmp_path), version="var"), Logger)


@every("callbacks")
def test_every_callback_is_built_with_the_runs_evaluator(name):
    cfg = composed("train", override("callbacks", name))
    for entry in cfg.callbacks[stage_of(name)].values():
        made = instantiate(entry)
        assert isinstance(made if isinstance(made, Callback) else made(None), Callback)


@every("evaluation")
def test_every_evaluation_names_a_network_of_features(name):
    cfg = composed("train", f"evaluation={name}")
    assert callable(instantiate(cfg.evaluation.features))
    assert min(cfg.evaluation.num_samples, cfg.evaluation.batch_size) >= 1


def command_in(path: Path) -> list[str]:
    """The arguments of the `python train.py ...` in the comment that a file opens with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    (command,) = [line for line in lines if line.startswith("python train.py")]
    return command.split()[2:]


@every("experiment")
def test_every_experiment_opens_with_its_command_and_that_command_works(name):
    arguments = command_in(CONF / "experiment" / f"{name}.yaml")
    assert arguments[0] == f"experiment={name}"
    cfg = composed("train", *arguments)
    assert resolved(cfg)
    build_networks(cfg)


@every("experiment")
def test_an_experiment_chooses_images_and_with_them_their_recipe(name):
    choices = composed("train", f"experiment={name}").hydra.runtime.choices
    assert choices.recipe == choices.data


def test_cfg_job_prints_the_composition_of_an_experiment():
    done = run("train", "--cfg", "job", "experiment=shapes")
    assert done.code == 0 and "_target_: var_exp.data.Shapes" in done.out


@pytest.mark.parametrize("data", options("data"))
def test_what_the_command_line_chooses_wins_over_what_the_data_suggest(data):
    chosen = ["transformer=d16", "scales=var_256", "tokenizer=vae_ch160v4096z32"]
    cfg = composed("train", f"data={data}", *chosen)
    expected = composed("train", *chosen)
    for group in ("transformer", "scales", "tokenizer"):
        assert cfg[group] == expected[group]


@every("recipe")
def test_a_recipe_has_the_last_word_on_every_value_it_names(name):
    recipe = OmegaConf.load(CONF / "recipe" / f"{name}.yaml")
    cfg = composed("train", f"data={name}")
    assert OmegaConf.merge(cfg, recipe) == cfg
