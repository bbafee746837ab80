"""Checks of a configuration that span several keys, and show before anything is built."""

import inspect
import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from var_exp.distributed.launch import check_tasks
from var_exp.experiment.config.validate import check_part
from var_exp.io.files import check_writable
from var_exp.sampling import check_settings
from var_exp.training.callbacks.evaluation import Callback, EvaluationCallback, check_interval
from var_exp.training.fit import check_precision

TRAINED = ("tokenizer", "var")
STAGES = ("tokenizer", "tokens", "var")  # `tokens` encodes the images, and trains nothing
MAX_THREADS = max(256, os.cpu_count() or 1)  # libgomp ends a process that cannot have so many


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
    corrupt = cfg.model.var.get("self_correction_prob", 0)
    if "tokens" in cfg.stages and corrupt > 0:
        raise ValueError(
            f"tokens: model.var.self_correction_prob={corrupt} chooses codes again, which takes "
            f"the images; set it to 0, or leave tokens out of stages, now {list(cfg.stages)}"
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
    frozen = cfg.model.tokenizer.freeze if "tokenizer" in cfg.stages else None
    if frozen and not cfg.init_from:
        raise ValueError(
            f"model.tokenizer: freeze {list(frozen)} would keep what nobody trained; name what it "
            f"starts from (init_from=PATH), or freeze nothing (model.tokenizer.freeze=[])"
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


def check_sweep(num_processes: int) -> None:
    """Raise ValueError for several processes in a sweep that Hydra runs within this one.

    Each process that Lightning starts would start the program again, and with it the sweep.
    """
    hydra = HydraConfig.get()
    within = hydra.launcher.get("_target_", "").endswith("BasicLauncher")
    if hydra.mode == RunMode.MULTIRUN and within and num_processes > 1:
        raise ValueError(
            f"devices: expected 1 with --multirun, whose points are run by this process, got "
            f"{num_processes}; run them one by one, or as jobs (hydra/launcher=slurm)"
        )
