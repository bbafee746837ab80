"""Train the tokenizer, encode the images, train the next-scale transformer; say what came out.

python train.py                          both stages on the embedded digits
python train.py data=shapes              other images
python train.py 'stages=[tokenizer]'     one stage alone
python train.py --cfg job                what would run
python train.py check=true ...           what is wrong, and what it would take: docs/preflight.md
"""

from var_exp.distributed.signals import (
    Interrupted,
    Interruption,
    forget_trace,
    is_started_first,
    leave,
)

interruption = Interruption()
if __name__ == "__main__":
    interruption.install()  # before the slow imports: a signal may come while they last

import difflib
import functools
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from var_exp.data import ImageDataModule, ImageSource
from var_exp.data.tokens.cache import forget_codes
from var_exp.data.workers import number_of_workers
from var_exp.distributed.launch import check_meeting_point
from var_exp.distributed.slurm import requeue
from var_exp.evaluation.evaluator import Evaluator
from var_exp.experiment.build import (
    CHOICES,
    check_choices,
    course,
    make_cache,
    make_data,
    make_evaluator,
    make_module,
    make_modules,
    make_tokenizer,
    make_trainer,
    make_transformer,
    new_tokenizer,
    place_of_tokens,
    plain,
    trained,
)
from var_exp.experiment.entry import (
    check_sweep,
    how_to_go_on,
    launch,
    parts_from_files,
    record_composition,
    recorded,
    report_errors,
    summary,
    without_parts,
)
from var_exp.experiment.preflight import Job, preflight
from var_exp.experiment.resume import changed_code, check_changes, is_begun_anew, mark_begun_anew
from var_exp.io.environment import environment
from var_exp.io.lock import locked
from var_exp.io.run_folder import point_latest, read_metrics, write_metrics
from var_exp.io.text import shown_path
from var_exp.ops.memory import keep_memory
from var_exp.report import write_report
from var_exp.tokenizer import VQVAE
from var_exp.training.encode import encode_stage
from var_exp.training.fit import check_share, check_stage, fit_stage, idle_trainer
from var_exp.training.module import StageModule
from var_exp.training.resume import forget, is_finished, newest_path


def train(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """Run the configured stages; all final metrics, keyed `stage/metric`."""
    check_choices(cfg)
    keep_memory()
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    if cfg.resume == "never" and is_begun_anew(run_dir):
        cfg = OmegaConf.merge(cfg, {"resume": "auto"})
    data = make_data(cfg)
    tokenizer = make_tokenizer(cfg, data.source, run_dir)
    modules = make_modules(cfg, data.source, tokenizer)  # all of them: mistakes show now
    trainer = idle_trainer(make_trainer(cfg))
    check_sweep(trainer.num_devices * trainer.num_nodes)
    over = set()
    for stage, module in modules.items():
        found = check_stage(module, run_dir, **course(cfg, stage, data.source))
        if found is not None and is_finished(found.content):
            over.add(stage)
        del found  # or the whole checkpoint would stay in memory
        check_share(stage, cfg.model[stage].batch_size, trainer)
    check_codes(cfg, data, tokenizer, run_dir)
    check_meeting_point(trainer.num_devices * trainer.num_nodes, trainer.num_nodes)
    tell_changes(cfg, run_dir)
    evaluator = make_evaluator(cfg, data.source, run_dir)
    if is_started_first():
        if cfg.resume == "never":
            begin_anew(cfg, run_dir)
        record_composition(cfg, run_dir)
        point_latest(Path(cfg.runs_dir), run_dir)

        print(outline(cfg, modules, data, run_dir), flush=True)
    metrics = read_metrics(run_dir / "metrics.json")  # of a stage that was run here before
    for stage in cfg.stages:
        if stage == "tokens":
            encode(cfg, tokenizer, data, run_dir, needed="var" not in over)
            continue
        module = modules[stage]
        fitted = fit(cfg, module, data, evaluator, run_dir)
        scores = module.final_scores(evaluator, run_dir / "samples")
        results = fitted.metrics | scores | {"seconds": fitted.seconds}
        metrics = metrics.with_stage(stage, results, module.protocol(evaluator))
        if data.rank == 0:
            write_metrics(metrics, run_dir / "metrics.json")
            write_report(run_dir)
    if data.rank == 0 and modules:
        print(summary(cfg.name, metrics, run_dir, cfg.expected))
        report_bad_images(data.source)
    return metrics.figures


def outline(
    cfg: DictConfig, modules: Mapping[str, StageModule], data: ImageDataModule, run_dir: Path
) -> str:
    """What is going to be trained, and where it goes, in one line."""
    stages = []
    for stage in cfg.stages:
        if stage not in modules:
            stages.append(f"{stage} (into {shown_path(place_of_tokens(cfg, run_dir).resolve())})")
            continue
        lengths = course(cfg, stage, data.source)
        stages.append(
            f"{stage} ({lengths['num_batches']:,} batches of {lengths['batch_size']} images)"
        )
    return f"{cfg.name}: {', then '.join(stages)}, into {shown_path(run_dir)}"


# -- going on ----------------------------------------------------------------------


def begin_anew(cfg: DictConfig, run_dir: Path) -> None:
    """Forget what the run folder holds of the stages, all of them before the first one trains."""
    for stage in trained(cfg):
        forget(run_dir, stage)
    if owns_tokens(cfg, run_dir) and {"tokenizer", "tokens"} & set(cfg.stages):
        forget_codes(place_of_tokens(cfg, run_dir))
    mark_begun_anew(run_dir)


def check_codes(cfg: DictConfig, data: ImageDataModule, tokenizer: VQVAE, run_dir: Path) -> None:
    """Raise ValueError where the folder of the codes has others, as far as that is known yet."""
    begins_anew = cfg.resume == "never" and owns_tokens(cfg, run_dir)
    if "tokens" in cfg.stages and not begins_anew:
        known = "tokenizer" not in cfg.stages
        make_cache(cfg, data, tokenizer, run_dir, known).check()


def owns_tokens(cfg: DictConfig, run_dir: Path) -> bool:
    """Whether the codes are of this run alone, in its folder."""
    return run_dir.resolve() in place_of_tokens(cfg, run_dir).resolve().parents


def tell_changes(cfg: DictConfig, run_dir: Path) -> None:
    """Say what is different from when the run was started; raise ValueError if it matters."""
    begun = [stage for stage in trained(cfg) if newest_path(run_dir / stage)]
    if not begun or cfg.resume == "never" or not is_started_first():
        return
    was, room = recorded(run_dir)
    now = environment()
    code = changed_code(room, now)
    same_code = not code and not now["git_dirty"]
    found = code + check_changes(run_dir, was, plain(cfg), begun, same_code)
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
            cache=lambda data, tokenizer: make_cache(cfg, data, tokenizer, run_dir, False),
            samples=cfg.evaluation.batch_size,
            seed=cfg.seed,
            num_workers=number_of_workers(cfg.datamodule.num_workers),
            everything=cfg.check == "all",
        )
    )
    return found.tell()


# -- one stage ------------------------------------------------------


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


def encode(
    cfg: DictConfig, tokenizer: VQVAE, data: ImageDataModule, run_dir: Path, needed: bool
) -> None:
    """Let stage two read codes, which are made where they are missing.

    Args:
        needed: whether images are still to be trained on; else codes that are there are used.
    """
    cache = make_cache(cfg, data, tokenizer, run_dir, known=True)
    if not needed and not cache.is_complete():
        return
    first = is_started_first() and not cache.is_complete()
    with locked(cache.folder, "tokens.dir=...") if first else nullcontext():
        encode_stage(tokenizer, data, make_trainer(cfg), cache, cfg.tokens.batch_size, interruption)


def report_bad_images(source: ImageSource) -> None:
    bad = sorted(source.bad_images)
    if bad:
        print(f"{len(bad)} images did not decode and were skipped, the first is {bad[0]}")


@hydra.main(version_base=None, config_path="conf", config_name="train")
@report_errors
def main(cfg: DictConfig) -> float | None:
    if cfg.check:
        with interruption.heeded():
            sys.exit(check_job(cfg, Path(cfg.run_dir).resolve()) if is_started_first() else 0)
    run_dir = Path(HydraConfig.get().runtime.output_dir).resolve()
    interruption.install()  # again: a launcher may run this in a process of its own
    try:
        with interruption.heeded(), locked(run_dir) if is_started_first() else nullcontext():
            forget_trace(run_dir)
            metrics = train(cfg, run_dir)
    except Interrupted as stop:
        requeue(stop)
        leave(stop, run_dir, how_to_go_on(run_dir))
    if cfg.objective and cfg.objective not in metrics:
        raise ValueError(
            f"objective: expected a figure of metrics.json, such as "
            f"{', '.join(difflib.get_close_matches(cfg.objective, metrics, n=5, cutoff=0.3))}; got "
            f"{cfg.objective!r}"
        )
    return metrics[cfg.objective] if cfg.objective else None


if __name__ == "__main__":
    try:
        if any(re.match(r"\+*check=(?!false)", argument) for argument in sys.argv):
            sys.argv.append("hydra.run.dir=.")  # or Hydra makes the folder of the run
        launch(main, "train")
    finally:
        interruption.finish()
