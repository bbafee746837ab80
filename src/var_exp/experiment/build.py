"""From a composition to the objects of a training, and what a composition must not be.

Each function takes the whole composition and hands its parts, as plain values and modules, to the
rooms that know nothing of Hydra.
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from var_exp.checkpoint.load import read_tokenizer
from var_exp.checkpoint.warm_start import warm_start_from
from var_exp.data import ImageDataModule, ImageSource, TokenCache
from var_exp.distributed.launch import check_tasks, given_by_torchrun
from var_exp.evaluation import FeatureNetwork, ScoreSettings
from var_exp.evaluation.evaluator import Evaluator
from var_exp.experiment.config.validate import check_part
from var_exp.io.files import check_writable
from var_exp.sampling.generate import check_settings
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE
from var_exp.training.callbacks.evaluation import Callback, EvaluationCallback, check_interval
from var_exp.training.encode import cache_key
from var_exp.training.fit import ALL, check_precision
from var_exp.training.module import StageModule
from var_exp.transformer import VAR

TRAINED = ("tokenizer", "var")
MAX_THREADS = max(256, os.cpu_count() or 1)  # libgomp ends a process that cannot have so many
STAGES = ("tokenizer", "tokens", "var")  # `tokens` encodes the images, and trains nothing


def trained(cfg: DictConfig) -> list[str]:
    """The stages that train a network."""
    return [stage for stage in cfg.stages if stage in TRAINED]


def check_choices(cfg: DictConfig) -> None:
    """Raise ValueError for what would otherwise show only after a stage was trained."""
    for check in CHOICES:
        check(cfg)


def check_stages(cfg: DictConfig) -> None:
    if not cfg.stages or list(cfg.stages) != [stage for stage in STAGES if stage in cfg.stages]:
        raise ValueError(
            f"stages: expected [tokenizer,tokens,var] or some of them in this order, got "
            f"{list(cfg.stages)}"
        )
    if cfg.tokenizer_ckpt and "tokenizer" in cfg.stages:
        raise ValueError(
            f"tokenizer_ckpt: {cfg.tokenizer_ckpt!r} would be ignored, since stages has the "
            f"tokenizer; use 'stages=[var]' to train on it, or leave it out"
        )


def check_tokens(cfg: DictConfig) -> None:
    if cfg.tokens.dir is not None:
        check_writable(Path(cfg.tokens.dir), "tokens.dir")
    corrupt = cfg.model.var.module.get("corrupt", 0)
    if "tokens" in cfg.stages and corrupt > 0:
        raise ValueError(
            f"tokens: model.var.module.corrupt={corrupt} chooses codes anew, which takes the "
            f"images; set it to 0, or leave tokens out of stages, now {list(cfg.stages)}"
        )


def check_evaluation(cfg: DictConfig) -> None:
    counts = {name: cfg.evaluation[name] for name in ("num_samples", "num_samples_val")}
    smallest = max(2, cfg.evaluation.scores.num_neighbours + 1)
    if min(counts.values()) < smallest or cfg.evaluation.batch_size < 1:
        raise ValueError(
            f"evaluation: expected at least {smallest} samples to score (precision and recall need "
            f"more than evaluation.scores.num_neighbours) and a batch_size of at least 1, got "
            f"{counts} and {cfg.evaluation.batch_size}"
        )
    check_interval(cfg.evaluation.every_n_batches, cfg.evaluation.every_n_epochs)


def check_reference(cfg: DictConfig) -> None:
    reference = cfg.evaluation.reference
    if reference and not Path(reference).is_file():
        raise ValueError(f"evaluation: there is no file {reference!r} (evaluation.reference=PATH)")


def check_threads(cfg: DictConfig) -> None:
    if cfg.num_threads is not None and not 1 <= cfg.num_threads <= MAX_THREADS:
        raise ValueError(
            f"num_threads: expected 1 to {MAX_THREADS}, or null for one on each core, got "
            f"{cfg.num_threads}"
        )


def check_objective(cfg: DictConfig) -> None:
    stages = trained(cfg)
    if cfg.objective and cfg.objective.partition("/")[0] not in stages:
        raise ValueError(
            f"objective: expected a metric of one of the stages {stages}, such as "
            f"{(stages or TRAINED)[-1]}/loss, got {cfg.objective!r}"
        )


def check_frozen(cfg: DictConfig) -> None:
    frozen = cfg.model.tokenizer.module.freeze if "tokenizer" in cfg.stages else None
    if frozen and not cfg.init_from:
        raise ValueError(
            f"model.tokenizer: freeze {list(frozen)} would keep what nobody trained; name what it "
            f"starts from (init_from=PATH), or freeze nothing (model.tokenizer.module.freeze=[])"
        )


def check_parts(cfg: DictConfig) -> None:
    """Raise what callbacks and loggers raise that cannot be made.

    Those that are completed with the evaluator later are only looked at: it is made last.
    """
    for entry in cfg.logger.values():
        instantiate(entry)
    for stage in trained(cfg):
        for name, entry in cfg.callbacks[stage].items():
            made, key = instantiate(entry), f"callbacks.{stage}.{name}"
            check_part(made, Callback, key, None)
            target = getattr(made, "func", None)
            if inspect.isclass(target) and issubclass(target, EvaluationCallback):
                check_interval(entry.get("every_n_batches"), entry.get("every_n_epochs"), key)


CHOICES = (
    check_stages,
    check_tokens,
    check_evaluation,
    check_reference,
    check_objective,
    check_frozen,
    check_threads,
    check_parts,
    lambda cfg: check_tasks(cfg.trainer.devices, cfg.trainer.num_nodes),
    lambda cfg: check_precision(cfg.trainer.precision),
    lambda cfg: check_settings(**cfg.sampling, seed=cfg.seed),
)


def course(cfg: DictConfig, stage: str, source: ImageSource) -> dict[str, Any]:
    """What decides a stage's batches, and whether it goes on: arguments of `fit_stage`."""
    model = cfg.model[stage]
    num_batches = model.num_batches
    if (num_batches is None) == (model.epochs is None):
        raise ValueError(
            f"model.{stage}: expected num_batches or epochs, the other one null, got "
            f"{num_batches} and {model.epochs} (model.{stage}.num_batches, model.{stage}.epochs)"
        )
    if num_batches is None:
        num_batches = math.ceil(model.epochs * math.ceil(len(source.train) / model.batch_size))
    return {
        "batch_size": model.batch_size,
        "num_batches": num_batches,
        "val_every": model.val_every,
        "seed": cfg.seed,
        "resume": cfg.resume,
        "save_every": model.save_every,
        "views": views_of(cfg, source, model.batch_size * num_batches) if stage == "var" else ALL,
    }


def views_of(cfg: DictConfig, source: ImageSource, num_seen: int) -> int | str:
    """How many views each training image has: "all" where every epoch has its own, or needs none.

    Args:
        num_seen: images that stage two sees, one as often as it comes.
    """
    cached = "tokens" in cfg.stages and source.varies
    return cfg.tokens.views if cached and cfg.tokens.views < epochs(source, num_seen) else ALL


def epochs(source: ImageSource, num_images: int) -> int:
    """The epochs that so many images begin."""
    return math.ceil(num_images / len(source.train))


def make_data(cfg: DictConfig) -> ImageDataModule:
    source = instantiate(cfg.data, _convert_="all")
    data = instantiate(cfg.datamodule, _partial_=True)(source)
    data.prepare_data()
    data.setup()
    return data


def make_tokenizer(
    cfg: DictConfig, source: ImageSource, run_dir: Path, device: str = "cpu"
) -> VQVAE:
    """A new tokenizer, or the one that stage two alone continues from."""
    if "tokenizer" in cfg.stages:
        tokenizer = new_tokenizer(cfg, source, device)
        warm_start_from(cfg.init_from, tokenizer, cfg.stages)
    else:
        own = run_dir if (run_dir / "tokenizer").is_dir() else None
        places = {"tokenizer_ckpt": cfg.tokenizer_ckpt, "run_dir": own, "init_from": cfg.init_from}
        tokenizer = read_tokenizer(places, cfg.scales.patch_nums)
    if tokenizer.schedule != ScaleSchedule(cfg.scales.patch_nums):
        raise ValueError(
            f"tokenizer_ckpt: the tokenizer has scales {tokenizer.schedule.patch_nums}, this run "
            f"{cfg.scales.patch_nums}; set scales.patch_nums or use another tokenizer"
        )
    channels = tokenizer.encoder.spec["in_channels"]
    if channels != source.channels:
        raise ValueError(
            f"tokenizer_ckpt: the tokenizer is for images of {channels} channels, those of "
            f"{source.name} have {source.channels}; choose another data=... or another tokenizer"
        )
    tokenizer.schedule.check_image(source.image_size, tokenizer.encoder.stride)
    return tokenizer


def new_tokenizer(cfg: DictConfig, source: ImageSource, device: str) -> VQVAE:
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        return instantiate(
            cfg.tokenizer,
            encoder={"in_channels": source.channels},
            decoder={"out_channels": source.channels},
            _convert_="all",
        )


def make_modules(cfg: DictConfig, source: ImageSource, tokenizer: VQVAE) -> dict[str, StageModule]:
    """The stages' modules, in order. They share the tokenizer, which stage one trains in place."""
    networks: dict[str, dict[str, nn.Module]] = {"tokenizer": {"tokenizer": tokenizer}}
    if "var" in cfg.stages:
        networks["var"] = {
            "tokenizer": tokenizer,
            "transformer": make_transformer(cfg, source, tokenizer),
        }
    return {stage: make_module(cfg, stage, networks[stage]) for stage in trained(cfg)}


def place_of_tokens(cfg: DictConfig, run_dir: Path) -> Path:
    return Path(cfg.tokens.dir or run_dir / "tokens")


def make_cache(
    cfg: DictConfig, data: ImageDataModule, tokenizer: VQVAE, run_dir: Path, known: bool
) -> TokenCache:
    """The files of the codes that stage two trains from, which need not be there.

    It has no more views than stage two has epochs, and one where all epochs are alike.

    Args:
        known: whether the tokenizer is the one that encodes, or only one like it.
    """
    source, ours = data.source, course(cfg, "var", data.source)
    begun = epochs(source, ours["batch_size"] * ours["num_batches"]) if source.varies else 1
    described = OmegaConf.to_container(cfg.data, resolve=True)
    fingerprint = tokenizer.fingerprint() if known else None
    key = cache_key(source, described, data.seed, tokenizer, fingerprint)
    return TokenCache(place_of_tokens(cfg, run_dir), key, min(cfg.tokens.views, max(1, begun)))


def make_module(cfg: DictConfig, stage: str, networks: Mapping[str, nn.Module]) -> StageModule:
    return instantiate(cfg.model[stage].module, _partial_=True, _convert_="all")(**networks)


def make_transformer(
    cfg: DictConfig, source: ImageSource, tokenizer: VQVAE, device: str = "cpu"
) -> VAR:
    torch.manual_seed(cfg.seed)
    with torch.device(device):
        transformer = instantiate(
            cfg.transformer,
            vocab_size=tokenizer.quantizer.vocab_size,
            code_dim=tokenizer.quantizer.code_dim,
            num_classes=source.num_classes,
            _convert_="all",
        )
    warm_start_from(cfg.init_from, transformer, cfg.stages)
    return transformer


def make_evaluator(cfg: DictConfig, source: ImageSource, run_dir: Path) -> Evaluator:
    chosen = cfg.evaluation
    settings = {
        "num_samples": chosen.num_samples,
        "num_samples_per_scale": chosen.num_samples_per_scale,
        "batch_size": chosen.batch_size,
        "seed": cfg.seed,
        "reference": chosen.reference,
        "num_reference": chosen.num_reference,
        "cache": chosen.cache,
        "score_settings": ScoreSettings(**chosen.scores),
    }
    sampling = OmegaConf.to_container(cfg.sampling, resolve=True)
    # Last: the classifier is trained and written here, which no mistake above may come after.
    network = make_network(cfg, run_dir, source)
    return Evaluator(source, network, sampling, **settings)


def make_network(
    cfg: DictConfig, run_dir: Path | None, source: ImageSource | None
) -> FeatureNetwork:
    """The network whose features samples are compared in; the run's classifier is trained for it.

    Args:
        run_dir, source: of the run whose samples they are, None where it is not known.
    """
    make = instantiate(cfg.evaluation.network)
    given = run_dir and run_dir / "evaluation" / "classifier.pt", source
    check_part(make, FeatureNetwork, "evaluation.network", *given)
    return make(*given)


def make_trainer(cfg: DictConfig) -> Callable[..., Any]:
    return instantiate(cfg.trainer, **given_by_torchrun(), _partial_=True)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of the run, as plain data."""
    return OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
    )
