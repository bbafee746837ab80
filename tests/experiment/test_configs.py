"""Every YAML under conf/ composes into the programs' configurations, and what it describes can be
built. The files are found, not listed: a new one is covered by being there."""

import functools
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from helpers.command import composed, run
from var_exp.data import ImageDataModule, ImageSource
from var_exp.evaluation import ScoreSettings
from var_exp.experiment import build
from var_exp.experiment.config.overrides import CONF
from var_exp.experiment.run import Run
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE
from var_exp.training.module import StageModule
from var_exp.training.optim import LinearSchedule
from var_exp.training.scaling_law import LAST_SCALE, MEAN
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
    source = source_of(cfg)
    on_meta = functools.partial(build.transformer, device="meta")  # whatever their size
    with mock.patch.object(build, "transformer", on_meta), torch.device("meta"):
        tokenizer = build.tokenizer(cfg, source, Run(Path("nowhere"), cfg), device="meta")
        return build.modules(cfg, source, tokenizer)


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
    assert cfg.name == "digits" and list(cfg.stages) == ["tokenizer", "tokens", "var"]
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


@every("transformer")
def test_every_transformer_takes_every_option(name):
    options = {"rope": True, "mlp": "swiglu", "norm": "rms", "mlp_ratio": 2.0, "drop_path": 0.3}
    arguments = [f"transformer.{key}={value}" for key, value in options.items()]
    cfg = composed("train", f"transformer={name}", "scales=var_256", *arguments)
    with torch.device("meta"):
        network = instantiate(cfg.transformer, _convert_="all")
    assert options.items() <= network.config.items()


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
    assert min(model.batch_size, model.num_batches or model.epochs, model.val_every) >= 1
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
def test_every_set_of_images_gets_networks_that_fit(name):
    cfg = composed("train", f"data={name}")
    modules = build_networks(cfg)
    source, tokenizer = source_of(cfg), modules["tokenizer"].tokenizer
    tokenizer.schedule.check_image(source.image_size, tokenizer.encoder.stride)
    assert tokenizer.encoder.config["in_channels"] == source.channels
    assert modules["var"].transformer.num_classes == source.num_classes


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
    assert callable(instantiate(cfg.evaluation.network))
    assert min(cfg.evaluation.num_samples, cfg.evaluation.batch_size) >= 1
    ScoreSettings(**cfg.evaluation.scores)
    assert cfg.sampling == cfg.evaluation.sampling


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
    assert resolved(composed("train", *arguments))
    # What lies in files of others is left out: the published tokenizer, VGG's and DINO's weights.
    without_files = ["tokenizer_ckpt=null", "stages=[tokenizer,var]"]
    without_files += ["model.tokenizer.loss.lpips=0"]
    without_files += ["model.tokenizer.loss.perceptual=null"]
    build_networks(composed("train", *arguments, *without_files))


PAPER = {
    # depth, batch, epochs, base rate, final share of it, gate_init, final weight decay, pixels
    "imagenet256_var_d16": (16, 768, 200, 1e-4, 0.1, 1e-3, None, 256),
    "imagenet256_var_d20": (20, 768, 250, 1e-4, 0.1, 1e-3, None, 256),
    "imagenet256_var_d24": (24, 768, 350, 8e-5, 0.01, 1e-4, None, 256),
    "imagenet256_var_d30": (30, 1024, 350, 8e-5, 0.01, 1e-5, 0.08, 256),
    "imagenet512_var_d36": (36, 768, 350, 8e-5, 0.01, 5e-6, 0.08, 512),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_have_the_published_recipe(name):
    cfg = composed("train", f"experiment={name}")
    depth, batch, epochs, base, final, gate_init, decay, pixels = PAPER[name]
    model, module = cfg.model.var, cfg.model.var
    assert (model.batch_size, model.epochs) == (batch, epochs)
    assert module.optimizer.lr == pytest.approx(base * batch / 256)
    assert list(module.optimizer.betas) == [0.9, 0.95]
    schedule = instantiate(module.schedule)
    assert type(schedule) is LinearSchedule and schedule.final == final
    assert (schedule.warmup, schedule.start, schedule.hold) == (0.02, 0.005, 0.05)
    assert (module.weight_decay, module.final_weight_decay) == (0.05, decay)
    assert (module.clip, module.class_dropout_prob, module.label_smoothing) == (2.0, 0.1, 0.0)
    assert module.ema_decay == 0 and module.progressive is None and module.self_correction_prob == 0
    assert (cfg.transformer.depth, cfg.transformer.gate_init) == (depth, gate_init)
    assert cfg.transformer.drop_path == pytest.approx(0.1 * depth / 24, abs=1e-6)
    assert cfg.transformer.block == ("shared_adaln" if depth == 36 else "adaln")
    assert cfg.transformer.dropout == 0 and not cfg.transformer.rope
    assert cfg.data.image_size == pixels == 16 * cfg.scales.patch_nums[-1] and not cfg.data.flip
    assert (cfg.trainer.precision, list(cfg.stages)) == ("bf16-mixed", ["var"])
    assert dict(cfg.sampling) == {
        "cfg_scale": 1.5,
        "top_k": 900,
        "top_p": 0.96,
        "temperature": 1.0,
    }
    header = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert "trainer.devices=8" in header and "srun --nodes" in header
    for said in ("# Cost:", "# Expected:", "FID"):
        assert said in header


@pytest.mark.parametrize("name", [name for name in PAPER if "256" in name])
def test_the_expected_loss_is_the_one_of_the_papers_scaling_law(name):
    cfg = composed("train", f"experiment={name}")
    values = {"vocab_size": 4096, "code_dim": 32, "num_classes": 1000}
    with torch.device("meta"):
        network = instantiate(cfg.transformer, **values, _convert_="all")
    size = sum(p.numel() for p in network.parameters())
    for key, law in (("var/loss", MEAN), ("var/loss_last_scale", LAST_SCALE)):
        low, high = cfg.expected[key]
        assert low == pytest.approx(law.loss(size) - 0.05, abs=0.01)
        assert high == pytest.approx(law.loss(size) + 0.05, abs=0.01)


def test_epochs_are_counted_in_whole_batches():
    in_epochs = ["model.var.epochs=3", "model.var.batch_size=500"]
    cfg = composed("train", *in_epochs, "model.var.num_batches=null")
    source = source_of(cfg)
    source.setup()
    for both_or_none in (in_epochs, ["model.var.num_batches=null"]):
        with pytest.raises(ValueError, match="expected num_batches or epochs, the other one null"):
            build.schedule(composed("train", *both_or_none), "var", source)
    assert build.schedule(cfg, "var", source).num_batches == 9  # 1,437 images are three batches
    assert build.schedule(cfg, "tokenizer", source).num_batches == 1200


@every("adversary")
def test_every_adversary_is_described(name):
    cfg = composed("train", f"adversary={name}")
    assert cfg.model.tokenizer.adversary == cfg.adversary
    if name == "patchgan":
        module = build_networks(composed("train", "adversary=patchgan", "data=shapes"))["tokenizer"]
        assert module.adversary.factor(0, 100) == 0 and module.adversary.factor(99, 100) == 1


def test_cfg_job_prints_the_composition_of_an_experiment():
    done = run("train", "--cfg", "job", "experiment=cifar10_d8")
    assert done.code == 0 and "_target_: var_exp.data.CIFAR10" in done.out


@pytest.mark.parametrize("data", options("data"))
def test_what_the_command_line_chooses_wins_over_what_the_data_suggest(data):
    chosen = ["transformer=d16", "scales=var_256", "tokenizer=vae_ch160v4096z32"]
    cfg = composed("train", f"data={data}", *chosen)
    expected = composed("train", *chosen)
    for group in ("transformer", "scales", "tokenizer"):
        assert cfg[group] == expected[group]


@every("data")
def test_a_set_of_images_has_the_last_word_on_every_value_it_names(name):
    named = OmegaConf.load(CONF / "data" / f"{name}.yaml")
    named.pop("defaults", None)
    cfg = composed("train", f"data={name}")
    assert OmegaConf.merge(cfg, named) == cfg
