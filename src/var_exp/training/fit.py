"""Run one stage: loops, checkpoints, bars, and how long it took."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from var_exp.data import ImageDataModule
from var_exp.distributed.signals import Interruption, is_started_first
from var_exp.training.callbacks.batch_counter import BatchProgress
from var_exp.training.callbacks.checkpointing import Checkpoints, SealedFiles
from var_exp.training.callbacks.progress_bar import progress_bar
from var_exp.training.callbacks.throughput import ThroughputMonitor
from var_exp.training.loggers.guarded import Guarded
from var_exp.training.module import StageModule
from var_exp.training.resume import (
    Found,
    best_or_newest,
    earlier,
    forget,
    is_finished,
    progress_in,
    provide_best,
)

UNFIT_ADVICE = (
    "does not have many workers",  # images in memory need none
    "module\\(s\\) in eval mode",  # the frozen tokenizer and the average are meant to be
    "treespec, LeafSpec",  # Lightning's own use of torch
    "Checkpoint directory",  # resuming writes where it wrote before
    "Experiment logs directory",
    "is smaller than the logging interval",
    "your dataloader is not resumable",  # its batches are a function of their number
    "`srun` command is available",  # whoever has Slurm may also train without it
    "callbacks used to create the checkpoint",  # what is looked at may change
    "FSDP2-wrapped module",  # nobody changes what a sharded module returns
)

VIEWS, ALL = "tokens.views", "all"
PRECISIONS = ("32-true", "bf16-mixed")


class Fitted(NamedTuple):
    """metrics: validation figures of the best weights, without `val/`.

    seconds: of training, earlier parts of an interrupted run included.
    """

    metrics: dict[str, float]
    seconds: float


def fit_stage(
    module: StageModule,
    datamodule: ImageDataModule,
    trainer: Callable[..., L.Trainer],
    *,
    run_dir: Path,
    batch_size: int,
    num_batches: int,
    val_every: int,
    seed: int,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Callable[..., Logger]] = (),
    config: Mapping[str, Any] | None = None,
    resume: str = "auto",
    save_every: int | None = None,
    views: int | str = ALL,
    interruption: Interruption | None = None,
) -> Fitted:
    """Train a module for `num_batches` global batches; leave its network with the best weights.

    The best of those that were validated; the moving average where the module keeps one.

    Args:
        trainer: called with what this function decides, gives the Trainer.
        run_dir: checkpoints go to `run_dir / module.stage`.
        val_every: batches between validations.
        seed: with the batch number and rank decides every random draw.
        loggers: each called with `save_dir` and `version`. None of them ends a run by failing.
        config: of the whole run, as plain data: told to the loggers.
        resume: what to go on from, see `var_exp.training.resume.earlier`.
        save_every: batches between checkpoints besides those at validations.
        views: how many each training image has, "all" where every epoch has its own.
        interruption: the signals of this process; None where nobody minds them.

    Raises:
        ValueError: a length below 1, an unknown `resume`, a checkpoint that does not fit.
        Interrupted: a signal came; what was trained is saved.
    """
    folder = run_dir / module.stage
    lengths = (batch_size, num_batches, val_every)
    found = check_stage(module, run_dir, *lengths, seed, resume, save_every, views)
    interruption = interruption or Interruption()
    if resume == "never" and is_started_first():
        forget(run_dir, module.stage)
    path, finished, seconds = None, False, 0.0
    if found is not None:
        module.on_load_checkpoint(found.content)
        if is_started_first():
            provide_best(folder, found)
        path, finished = found.path, is_finished(found.content)
        seconds = progress_in(found.content)["seconds"]
        del found  # or the whole checkpoint would stay in memory
    progress = BatchProgress(make_plan(seed, batch_size, num_batches, views))
    datamodule.plan(batch_size, num_batches)
    with quiet():
        runner = trainer(
            default_root_dir=folder,
            max_epochs=1,  # one Lightning epoch is the whole stage
            check_val_every_n_epoch=None,
            val_check_interval=min(val_every, num_batches),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=[Guarded(make, str(run_dir), module.stage) for make in loggers],
            callbacks=[
                progress,
                *([ThroughputMonitor()] if loggers else []),  # before those that may take long
                *callbacks,
                progress_bar(module.stage),
                Checkpoints(folder, *module.monitor, interruption, save_every),
            ],
            plugins=[SealedFiles()],
        )
        check_precision(runner.precision)
        check_share(module.stage, batch_size, runner)
        own_signals(runner)
        if not finished:
            if config:
                for logger in runner.loggers:
                    logger.log_hyperparams(config)
            with interruption.held():
                runner.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
            seconds = progress.seconds
            finish(runner.loggers)
        use_best_weights(module, folder)
        runner.logger = None  # the figures of the best weights are no step of training
        results = runner.validate(module, datamodule=datamodule, verbose=False)[0]
        module.to(runner.strategy.root_device)  # Lightning leaves it on the CPU
    metrics = {name.removeprefix("val/"): value for name, value in results.items()}
    return Fitted(metrics, seconds)


def check_stage(
    module: StageModule,
    run_dir: Path,
    batch_size: int,
    num_batches: int,
    val_every: int,
    seed: int,
    resume: str = "auto",
    save_every: int | None = None,
    views: int | str = ALL,
) -> Found | None:
    """Find what `fit_stage` would refuse, as far as it can be known before earlier stages ran.

    Returns:
        The checkpoint that the stage goes on from, if it does.

    Raises:
        ValueError: see `fit_stage`.
    """
    lengths = (batch_size, num_batches, val_every, 1 if save_every is None else save_every)
    if not all(isinstance(length, int) and length >= 1 for length in lengths):
        raise ValueError(
            f"model.{module.stage}: batch_size, num_batches and val_every must be at least 1, as "
            f"save_every where it is not null, got {batch_size}, {num_batches}, {val_every} and "
            f"{save_every}"
        )
    module.check_length(num_batches)
    module.check_optimizers()
    found = earlier(run_dir, module.stage, resume)
    if found is None:
        return None
    module.check_networks(found.content)
    ours = make_plan(seed, batch_size, num_batches, views)
    theirs = {VIEWS: ALL} | progress_in(found.content)["plan"]  # before there were token caches
    for name, value in theirs.items():
        if ours[name] != value:
            raise ValueError(
                f"resume: the run was started with {name} {value}, now it is {ours[name]}; its "
                f"schedules and images depend on it: keep it, or start in a new run "
                f"folder (run_dir=...), or anew (resume=never)"
            )
    return found


def idle_trainer(make: Callable[..., L.Trainer]) -> L.Trainer:
    """A Trainer that tells the devices; raise ValueError for what Lightning refuses."""
    try:
        with quiet():
            trainer = make(logger=False)
    except TypeError as error:
        raise ValueError(f"trainer: {error} (trainer=..., trainer.devices=...)") from None
    if not isinstance(trainer, L.Trainer):
        raise ValueError(
            f"trainer: expected a lightning Trainer, got a {type(trainer).__name__} "
            f"(trainer._target_)"
        )
    return trainer


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision in which quantizer, logits or losses would suffer."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer: precision must be one of {', '.join(PRECISIONS)}, got "
            f"{precision!r}; float16 would need its gradients scaled (trainer.precision)"
        )


def check_share(stage: str, batch_size: int, trainer: L.Trainer) -> None:
    """Raise ValueError unless the processes of a Trainer can share a global batch evenly."""
    devices, num_nodes = trainer.num_devices, trainer.num_nodes
    if batch_size % (devices * num_nodes):
        raise ValueError(
            f"model.{stage}: the global batch of {batch_size} images does not divide by "
            f"{devices * num_nodes} processes ({devices} devices x {num_nodes} machines); choose a "
            f"multiple (model.{stage}.batch_size), or other trainer.devices and trainer.num_nodes"
        )


def make_plan(
    seed: int, batch_size: int, num_batches: int, views: int | str
) -> dict[str, int | str]:
    """What a batch depends on besides its number."""
    lengths = {"batch_size": batch_size, "num_batches": num_batches}
    return {"seed": seed, **lengths, VIEWS: views}


def use_best_weights(module: StageModule, folder: Path) -> None:
    """Load the best checkpoint; give its averaged weights, where there are, to the network."""
    module.load_state_dict(best_or_newest(folder)["state_dict"])
    module.network.load_state_dict(module.evaluated.state_dict())
    module.network.eval()


def own_signals(runner: L.Trainer) -> None:
    """Keep Lightning from taking the signals in hand.

    Its handlers talk to the other processes within the handler, and meet the collectives that
    training is in the middle of: with two processes SIGTERM hung in three of three trials.
    """
    runner._signal_connector.register_signal_handlers = lambda: None


def finish(loggers: Sequence[Guarded]) -> None:
    """Close what a stage's loggers hold open, or the next stage would go on in their runs."""
    for logger in loggers:
        logger.finalize("success")
        logger.finish()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's advertising, and advice that does not hold here."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in UNFIT_ADVICE:
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
