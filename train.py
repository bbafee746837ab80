"""Train the tokenizer, then the next-scale transformer; evaluate, sample, say what came out.

python train.py                          both stages on the embedded digits
python train.py data=shapes              other images
python train.py 'stages=[tokenizer]'     one stage alone
python train.py --cfg job                what would run
python train.py check=true ...           what is wrong, and what it would take: docs/preflight.md
"""

from var_exp.interruption import Interrupted, Interruption, forget_trace, is_first, leave

interruption = Interruption()
if __name__ == "__main__":
    interruption.install()  # before the slow imports: a signal may come while they last

import difflib
import functools
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from var_exp.cli import (
    check_sweep,
    launch,
    parts_from_files,
    point_latest,
    read_metrics,
    record_composition,
    recorded,
    report_errors,
    summary,
    without_parts,
    write_metrics,
)
from var_exp.continuation import changed_code, check_changes
from var_exp.data import ImageDataModule, ImageSource
from var_exp.environment import environment
from var_exp.evaluation import ScoreSettings
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.report import write_report
from var_exp.lock import locked
from var_exp.preflight import Job, preflight
from var_exp.processes import check_tasks, given_by_torchrun
from var_exp.sampling import check_settings
from var_exp.scales import ScaleSchedule
from var_exp.slurm import requeue
from var_exp.sources import read_tokenizer
from var_exp.tokenizer import VQVAE
from var_exp.training.fit import check_precision, check_share, check_stage, fit_stage, quiet
from var_exp.training.saving import newest_path
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
    with quiet():
        trainer = make_trainer(cfg)(logger=False)
    check_sweep(trainer.num_devices * trainer.num_nodes)
    for stage, module in modules.items():
        check_stage(module, run_dir, **course(cfg, stage, data.source))
        check_share(stage, cfg.model[stage].batch_size, trainer)
    tell_changes(cfg, run_dir)
    evaluator = make_evaluator(cfg, data.source, run_dir)
    if is_first():
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
    for check in CHOICES:
        check(cfg)


def check_stages(cfg: DictConfig) -> None:
    if list(cfg.stages) not in (["tokenizer", "var"], ["tokenizer"], ["var"]):
        raise ValueError(
            f"stages: expected [tokenizer,var], [tokenizer] or [var], got {list(cfg.stages)}"
        )
    if cfg.tokenizer_ckpt and "tokenizer" in cfg.stages:
        raise ValueError(
            f"tokenizer_ckpt: {cfg.tokenizer_ckpt!r} would be ignored, since stages has the "
            f"tokenizer; use 'stages=[var]' to train on it, or leave it out"
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


def check_objective(cfg: DictConfig) -> None:
    if cfg.objective and cfg.objective.partition("/")[0] not in cfg.stages:
        raise ValueError(
            f"objective: expected a metric of one of the stages {list(cfg.stages)}, such as "
            f"{cfg.stages[-1]}/loss, got {cfg.objective!r}"
        )


CHOICES = (
    check_stages,
    check_evaluation,
    check_objective,
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
    }


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
    return {stage: make_module(cfg, stage, networks[stage]) for stage in cfg.stages}


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


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of the run, as plain data."""
    return OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
    )


def tell_changes(cfg: DictConfig, run_dir: Path) -> None:
    """Say what is different from when the run was started; raise ValueError if it matters."""
    begun = [stage for stage in cfg.stages if newest_path(run_dir / stage)]
    if not begun or cfg.resume != "auto" or not is_first():
        return
    was, room = recorded(run_dir)
    found = check_changes(run_dir, was, plain(cfg), begun) + changed_code(room, environment())
    if found:
        print(f"resume: different from when the run was started: {'; '.join(map(str, found))}")


# -- the check before a big job -------------------------------------------------------------


def check_job(cfg: DictConfig, run_dir: Path) -> int:
    """Say what is wrong with a job and what it would take; the exit code."""
    if cfg.check not in (True, "all"):
        raise ValueError(f"check: expected false, true or all, got {cfg.check!r}")
    found = preflight(
        Job(
            stages=list(cfg.stages),
            choices=[functools.partial(c, cfg) for c in CHOICES]
            + [functools.partial(tell_changes, cfg, run_dir)],
            files=parts_from_files(cfg),
            source=lambda: instantiate(cfg.data, _convert_="all"),
            tokenizer=lambda source: make_tokenizer(cfg, source, run_dir, "meta"),
            new_tokenizer=functools.partial(new_tokenizer, cfg, device="meta"),
            transformer=functools.partial(make_transformer, cfg, device="meta"),
            module=lambda stage, networks, failed: make_module(
                without_parts(cfg, failed), stage, networks
            ),
            course=functools.partial(course, cfg),
            check_stage=lambda module, **lengths: check_stage(module, run_dir, **lengths),
            trainer=OmegaConf.to_container(cfg.trainer, resolve=True),
            loggers={name: instantiate(c) for name, c in cfg.logger.items()},
            places=[run_dir, Path(cfg.runs_dir), Path(cfg.evaluation.cache)],
            samples=cfg.evaluation.batch_size,
            seed=cfg.seed,
            num_workers=cfg.datamodule.num_workers,
            everything=cfg.check == "all",
        )
    )
    return found.tell()


# -- one stage ------------------------------------------------------


def make_trainer(cfg: DictConfig) -> Callable[..., Any]:
    return instantiate(cfg.trainer, **given_by_torchrun(), _partial_=True)


def fit(cfg: DictConfig, module: StageModule, data, evaluator: Evaluator, run_dir: Path):
    callbacks = [instantiate(c) for c in cfg.callbacks[module.stage].values()]
    own = [c(evaluator) if isinstance(c, functools.partial) else c for c in callbacks]
    return fit_stage(
        module,
        data,
        make_trainer(cfg),
        run_dir=run_dir,
        callbacks=own,
        loggers=[instantiate(c) for c in cfg.logger.values()],
        config=plain(cfg),
        interruption=interruption,
        **course(cfg, module.stage, data.source),
    )


def report_bad_images(source: ImageSource) -> None:
    bad = sorted(source.bad_images)
    if bad:
        print(f"{len(bad)} images did not decode and were skipped, the first is {bad[0]}")


@hydra.main(version_base=None, config_path="conf", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float | None:
    if cfg.check:
        with interruption.heeded():
            sys.exit(check_job(cfg, Path(cfg.run_dir).resolve()) if is_first() else 0)
    run_dir = Path(HydraConfig.get().runtime.output_dir).resolve()
    interruption.install()  # again: a launcher may run this in a process of its own
    try:
        with interruption.heeded(), locked(run_dir) if is_first() else nullcontext():
            forget_trace(run_dir)
            metrics = train(cfg, run_dir)
    except Interrupted as stop:
        requeue(stop)
        leave(stop, run_dir)
    if cfg.objective and cfg.objective not in metrics:
        raise ValueError(
            f"objective: expected a figure of metrics.json, such as "
            f"{', '.join(difflib.get_close_matches(cfg.objective, metrics, n=5, cutoff=0.3))}; got "
            f"{cfg.objective!r}"
        )
    return metrics[cfg.objective] if cfg.objective else None


if __name__ == "__main__":
    try:
        if {"check=true", "check=all"} & set(sys.argv):
            sys.argv.append("hydra.run.dir=.")  # or Hydra makes the folder of the run
        launch(main, "train")
    finally:
        interruption.finish()
