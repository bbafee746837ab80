"""From a configuration to the objects of a training; nothing below sees the configuration.

Each function builds one object with plain values and modules, so a user's mistake is a ValueError
here, before anything is written.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from var_exp.checkpoint.load import read_tokenizer
from var_exp.checkpoint.warm_start import warm_start_from
from var_exp.data import ImageDataModule, ImageSource
from var_exp.distributed import signals
from var_exp.distributed.launch import given_by_torchrun
from var_exp.evaluation import FeatureNetwork, ScoreSettings
from var_exp.evaluation.evaluator import Evaluator
from var_exp.experiment.config.checks import trained
from var_exp.experiment.config.plain import plain
from var_exp.experiment.config.validate import check_part
from var_exp.experiment.run import Run
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE
from var_exp.training import fit
from var_exp.training.encode import EncodingStage
from var_exp.training.fit import ALL, StageSchedule, TrainingStage
from var_exp.training.module import StageModule
from var_exp.transformer import VAR

Stage = TrainingStage | EncodingStage
# Keys of `model.<stage>` that say how long it trains; the others are arguments of its module.
SCHEDULE = ("batch_size", "num_batches", "epochs", "val_every", "save_every")


# -- images -------------------------------------------------------------------------------


def source(cfg: DictConfig) -> ImageSource:
    """The images, not set up yet."""
    return instantiate(cfg.data, _convert_="all")


def datamodule(cfg: DictConfig) -> ImageDataModule:
    """The data module that all stages share, set up."""
    data = instantiate(cfg.datamodule, _partial_=True)(source(cfg))
    data.prepare_data()
    data.setup()
    return data


# -- networks -----------------------------------------------------------------------------


def tokenizer(cfg: DictConfig, images: ImageSource, run: Run, device: str = "cpu") -> VQVAE:
    """A new tokenizer, or the trained one that stage two alone continues from."""
    if "tokenizer" in cfg.stages:
        network = new_tokenizer(cfg, images, device)
        warm_start_from(cfg.init_from, network, cfg.stages)
    else:
        own = run.path if (run.path / "tokenizer").is_dir() else None
        paths = {"tokenizer_ckpt": cfg.tokenizer_ckpt, "run_dir": own, "init_from": cfg.init_from}
        network = read_tokenizer(paths, cfg.scales.patch_nums)
    if network.schedule != ScaleSchedule(cfg.scales.patch_nums):
        raise ValueError(
            f"tokenizer_ckpt: the tokenizer has scales {network.schedule.patch_nums}, this run "
            f"{cfg.scales.patch_nums}; set scales.patch_nums or use another tokenizer"
        )
    channels = network.channels
    if channels != images.channels:
        raise ValueError(
            f"tokenizer_ckpt: the tokenizer is for images of {channels} channels, those of "
            f"{images.name} have {images.channels}; choose another data=... or another tokenizer"
        )
    network.schedule.check_image(images.image_size, network.encoder.stride)
    return network


def new_tokenizer(cfg: DictConfig, images: ImageSource, device: str = "cpu") -> VQVAE:
    """A tokenizer with fresh weights."""
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        return instantiate(
            cfg.tokenizer,
            encoder={"in_channels": images.channels},
            decoder={"out_channels": images.channels},
            _convert_="all",
        )


def transformer(cfg: DictConfig, images: ImageSource, codes: VQVAE, device: str = "cpu") -> VAR:
    """A new transformer over the codes of a tokenizer."""
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        network = instantiate(
            cfg.transformer,
            vocab_size=codes.quantizer.vocab_size,
            code_dim=codes.quantizer.code_dim,
            num_classes=images.num_classes,
            _convert_="all",
        )
    warm_start_from(cfg.init_from, network, cfg.stages)
    return network


def modules(cfg: DictConfig, images: ImageSource, codes: VQVAE) -> dict[str, StageModule]:
    """The LightningModules of the stages that train, in order."""
    networks: dict[str, dict[str, nn.Module]] = {"tokenizer": {"tokenizer": codes}}
    if "var" in cfg.stages:
        networks["var"] = {"tokenizer": codes, "transformer": transformer(cfg, images, codes)}
    return {stage: module(cfg.model[stage], networks[stage]) for stage in trained(cfg)}


def module(model: DictConfig, networks: Mapping[str, nn.Module]) -> StageModule:
    """The LightningModule of a stage.

    Args:
        model: its part of the configuration, such as `cfg.model.var`.
        networks: of the stage, by argument.
    """
    own = {key: value for key, value in plain(model).items() if key not in SCHEDULE}
    return instantiate(own, _partial_=True, _convert_="all")(**networks)


# -- stages -------------------------------------------------------------------------------


def trainer(cfg: DictConfig) -> Callable[..., Any]:
    """What returns a Trainer, when a stage calls it with its own arguments."""
    return instantiate(cfg.trainer, **given_by_torchrun(), _partial_=True)


def num_devices(cfg: DictConfig) -> tuple[int, int]:
    """Return the devices of a machine and the machines that this run takes."""
    return fit.num_devices(trainer(cfg))


def stages(cfg: DictConfig, data: ImageDataModule, codes: VQVAE, run: Run) -> list[Stage]:
    """All stages, in order. They share the tokenizer, which the first one trains in place."""
    training = {
        stage: TrainingStage(
            trained_module,
            data,
            trainer(cfg),
            run.path,
            schedule(cfg, stage, data.source),
            callbacks=[instantiate(c) for c in cfg.callbacks[stage].values()],
            loggers=[instantiate(c) for c in cfg.logger.values()],
            config=plain(cfg),
            resume=run.resume,
            signals=signals.handler(),
        )
        for stage, trained_module in modules(cfg, data.source, codes).items()
    }
    built: dict[str, Stage] = {**training}
    if "tokens" in cfg.stages:
        built["tokens"] = tokens = encoding(cfg, data, codes, run)
        tokens.reader = training.get("var")
    return [built[stage] for stage in cfg.stages]


def encoding(cfg: DictConfig, data: ImageDataModule, codes: VQVAE, run: Run) -> EncodingStage:
    """The stage between the two, which encodes no more views than stage two has epochs."""
    folder = Path(cfg.tokens.dir or run.path / "tokens")
    ours = schedule(cfg, "var", data.source)
    num_images = ours.batch_size * ours.num_batches
    epochs = num_epochs(data.source, num_images) if data.source.varies else 1
    return EncodingStage(
        codes,
        data,
        trainer(cfg),
        folder,
        plain(cfg.data),
        num_views=min(cfg.tokens.views, max(1, epochs)),
        batch_size=cfg.tokens.batch_size,
        is_pretrained="tokenizer" not in cfg.stages,
        is_owned=run.path.resolve() in folder.resolve().parents,
        restarts=run.resume == "never",
        signals=signals.handler(),
    )


def schedule(cfg: DictConfig, stage: str, images: ImageSource) -> StageSchedule:
    """The lengths of a stage, in batches."""
    model = cfg.model[stage]
    num_batches = model.num_batches
    if (num_batches is None) == (model.epochs is None):
        raise ValueError(
            f"model.{stage}: expected num_batches or epochs, the other one null, got "
            f"{num_batches} and {model.epochs} (model.{stage}.num_batches, model.{stage}.epochs)"
        )
    if num_batches is None:
        num_batches = math.ceil(model.epochs * math.ceil(len(images.train) / model.batch_size))
    views = ALL
    if stage == "var" and "tokens" in cfg.stages and images.varies:
        epochs = num_epochs(images, model.batch_size * num_batches)
        views = cfg.tokens.views if cfg.tokens.views < epochs else ALL
    return StageSchedule(
        model.batch_size, num_batches, model.val_every, cfg.seed, model.save_every, views
    )


def num_epochs(images: ImageSource, num_images: int) -> int:
    """The epochs that so many training images begin."""
    return math.ceil(num_images / len(images.train))


# -- evaluation ---------------------------------------------------------------------------


def evaluator(cfg: DictConfig, images: ImageSource, run: Run) -> Evaluator:
    """What measures and draws the networks of this run.

    Built last: a classifier may be trained and written here, which no mistake may come after.
    """
    chosen = cfg.evaluation
    return Evaluator(
        images,
        feature_network(cfg, run.path, images),
        plain(cfg.sampling),
        num_samples=chosen.num_samples,
        num_samples_per_scale=chosen.num_samples_per_scale,
        batch_size=chosen.batch_size,
        seed=cfg.seed,
        reference=chosen.reference,
        num_reference=chosen.num_reference,
        cache=chosen.cache,
        score_settings=ScoreSettings(**chosen.scores),
    )


def feature_network(
    cfg: DictConfig, run_dir: Path | None, images: ImageSource | None
) -> FeatureNetwork:
    """The network whose features samples are compared in; the run's classifier is trained for it.

    Args:
        run_dir, images: of the run whose samples they are, None where it is not known.
    """
    make = instantiate(cfg.evaluation.network)
    arguments = run_dir and run_dir / "evaluation" / "classifier.pt", images
    check_part(make, FeatureNetwork, "evaluation.network", *arguments)
    return make(*arguments)


# -- parts that are read from files of others ----------------------------------------------

PERCEPTUAL = "model.tokenizer.loss.perceptual"


def parts_from_files(cfg: DictConfig) -> dict[str, Callable[[], object]]:
    """What makes each part of a training that is read from a file of others, by its key."""
    keys = [PERCEPTUAL, "adversary"] if "tokenizer" in cfg.stages else []
    chosen = {key: OmegaConf.select(cfg, key) for key in keys}
    parts: dict[str, Callable[[], object]] = {
        key: functools.partial(instantiate, c) for key, c in chosen.items() if c is not None
    }
    if "weights" in cfg.evaluation.network:  # others are trained on the images
        parts["evaluation.network"] = lambda: instantiate(cfg.evaluation.network)(None, None)
    return parts


def without_parts(cfg: DictConfig, keys: Iterable[str]) -> DictConfig:
    """The composition without some of those parts."""
    cfg = cfg.copy()
    for key in keys:
        OmegaConf.update(cfg, key, None)
        if key == PERCEPTUAL:
            cfg.model.tokenizer.loss.lpips = 0
    return cfg
