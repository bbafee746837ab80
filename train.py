"""Train the tokenizer, then the next-scale transformer; evaluate, sample, say what came out.

python train.py                          both stages on the embedded digits
python train.py data=shapes              other images
python train.py 'stages=[tokenizer]'     one stage alone
python train.py --cfg job                what would run
"""

import difflib
import functools
import math
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from var_exp.cli import (
    launch,
    point_latest,
    read_metrics,
    record_composition,
    report_errors,
    summary,
    write_metrics,
)
from var_exp.data import ImageDataModule, ImageSource
from var_exp.evaluation import ScoreSettings
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.report import write_report
from var_exp.sampling import check_settings
from var_exp.scales import ScaleSchedule
from var_exp.sources import read_tokenizer
from var_exp.tokenizer import VQVAE
from var_exp.training.fit import check_precision, check_stage, fit_stage
from var_exp.training.stage import StageModule
from var_exp.transfer import warm_start_from
from var_exp.transformer import VAR


def train(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """Run the configured stages; all final metrics, keyed `stage/metric`."""
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    check_choices(cfg)
    data = make_data(cfg)
    tokenizer = make_tokenizer(cfg, data.source, run_dir)
    modules = make_modules(cfg, data.source, tokenizer)  # all of them: mistakes show now
    for stage, module in modules.items():
        check_stage(module, run_dir, **course(cfg, stage, data.source))
    evaluator = make_evaluator(cfg, data.source, run_dir)
    record_composition(cfg, run_dir)
    point_latest(Path(cfg.runs_dir), run_dir)

    metrics = read_metrics(run_dir / "metrics.json")  # of a stage that was run here before
    for stage, module in modules.items():
        fitted = fit(cfg, module, data, evaluator, run_dir)
        scores = module.final_scores(evaluator, run_dir / "samples")
        results = fitted.metrics | scores | {"seconds": fitted.seconds}
        metrics = metrics.with_stage(stage, results, module.protocol(evaluator))
        if data.rank == 0:
            write_metrics(metrics, run_dir / "metrics.json")
            write_report(run_dir)
    if data.rank == 0:
        print(summary(cfg.name, metrics, run_dir, cfg.expected))
        report_bad_images(data.source)
    return metrics.figures


# -- from the configuration to objects ----------------------------------------------------


def check_choices(cfg: DictConfig) -> None:
    """Raise ValueError for what would otherwise show only after a stage was trained."""
    if list(cfg.stages) not in (["tokenizer", "var"], ["tokenizer"], ["var"]):
        raise ValueError(
            f"stages: expected [tokenizer,var], [tokenizer] or [var], got {list(cfg.stages)}"
        )
    if cfg.tokenizer_ckpt and "tokenizer" in cfg.stages:
        raise ValueError(
            f"tokenizer_ckpt: {cfg.tokenizer_ckpt!r} would be ignored, since stages has the "
            f"tokenizer; use 'stages=[var]' to train on it, or leave it out"
        )
    counts = {name: cfg.evaluation[name] for name in ("num_samples", "num_samples_val")}
    smallest = max(2, cfg.evaluation.scores.num_neighbours + 1)
    if min(counts.values()) < smallest or cfg.evaluation.batch_size < 1:
        raise ValueError(
            f"evaluation: expected at least {smallest} samples to score (precision and recall need "
            f"more than evaluation.scores.num_neighbours) and a batch_size of at least 1, got "
            f"{counts} and {cfg.evaluation.batch_size}"
        )
    if cfg.objective and cfg.objective.partition("/")[0] not in cfg.stages:
        raise ValueError(
            f"objective: expected a metric of one of the stages {list(cfg.stages)}, such as "
            f"{cfg.stages[-1]}/loss, got {cfg.objective!r}"
        )
    check_precision(cfg.trainer.precision)
    check_settings(**cfg.sampling, seed=cfg.seed)


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
    }


def make_data(cfg: DictConfig) -> ImageDataModule:
    source = instantiate(cfg.data, _convert_="all")
    data = instantiate(cfg.datamodule, _partial_=True)(source)
    data.prepare_data()
    data.setup()
    return data


def make_tokenizer(cfg: DictConfig, source: ImageSource, run_dir: Path) -> VQVAE:
    """A new tokenizer, or the one that stage two alone continues from."""
    if "tokenizer" in cfg.stages:
        torch.manual_seed(cfg.seed)
        tokenizer = instantiate(
            cfg.tokenizer,
            encoder={"in_channels": source.channels},
            decoder={"out_channels": source.channels},
            _convert_="all",
        )
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


def make_modules(cfg: DictConfig, source: ImageSource, tokenizer: VQVAE) -> dict[str, StageModule]:
    """The stages' modules, in order. They share the tokenizer, which stage one trains in place."""
    networks: dict[str, dict[str, nn.Module]] = {"tokenizer": {"tokenizer": tokenizer}}
    if "var" in cfg.stages:
        networks["var"] = {
            "tokenizer": tokenizer,
            "transformer": make_transformer(cfg, source, tokenizer),
        }
    return {
        stage: instantiate(cfg.model[stage].module, _partial_=True, _convert_="all")(
            **networks[stage]
        )
        for stage in cfg.stages
    }


def make_transformer(cfg: DictConfig, source: ImageSource, tokenizer: VQVAE) -> VAR:
    torch.manual_seed(cfg.seed)
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
    return Evaluator(
        source,
        instantiate(chosen.network)(run_dir / "evaluation" / "classifier.pt", source),
        OmegaConf.to_container(cfg.sampling, resolve=True),
        num_samples=chosen.num_samples,
        num_samples_per_scale=chosen.num_samples_per_scale,
        batch_size=chosen.batch_size,
        seed=cfg.seed,
        reference=chosen.reference,
        num_reference=chosen.num_reference,
        cache=chosen.cache,
        score_settings=ScoreSettings(**chosen.scores),
    )


# -- one stage ------------------------------------------------------


def fit(cfg: DictConfig, module: StageModule, data, evaluator: Evaluator, run_dir: Path):
    callbacks = [instantiate(c) for c in cfg.callbacks[module.stage].values()]
    own = [c(evaluator) if isinstance(c, functools.partial) else c for c in callbacks]
    return fit_stage(
        module,
        data,
        instantiate(cfg.trainer, _partial_=True),
        run_dir=run_dir,
        callbacks=own,
        loggers=[instantiate(c) for c in cfg.logger.values()],
        config=OmegaConf.to_container(
            OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
        ),
        **course(cfg, module.stage, data.source),
    )


def report_bad_images(source: ImageSource) -> None:
    bad = sorted(source.bad_images)
    if bad:
        print(f"{len(bad)} images did not decode and were skipped, the first is {bad[0]}")


@hydra.main(version_base=None, config_path="conf", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float | None:
    metrics = train(cfg, Path(HydraConfig.get().runtime.output_dir).resolve())
    if cfg.objective and cfg.objective not in metrics:
        raise ValueError(
            f"objective: expected a figure of metrics.json, such as "
            f"{', '.join(difflib.get_close_matches(cfg.objective, metrics, n=5, cutoff=0.3))}; got "
            f"{cfg.objective!r}"
        )
    return metrics[cfg.objective] if cfg.objective else None


if __name__ == "__main__":
    launch(main, "train")
