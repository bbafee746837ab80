"""A stage of training: its schedule, its loop with checkpoints and loggers, and its result."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from var_exp.data import ImageDataModule
from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import SignalHandler
from var_exp.evaluation.evaluator import Evaluator
from var_exp.training.callbacks.batch_counter import BatchProgress
from var_exp.training.callbacks.checkpointing import Checkpoints, ChecksummedFiles
from var_exp.training.callbacks.progress_bar import progress_bar
from var_exp.training.callbacks.throughput import ThroughputMonitor
from var_exp.training.loggers.guarded import FaultTolerantLogger
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


class StageSchedule(NamedTuple):
    """What the batches of a stage depend on, and when it validates and saves.

    Attributes:
        batch_size: images of a global batch.
        num_batches: length of the stage.
        val_every: batches between validations.
        seed: with the batch number and the rank decides every random draw.
        save_every: batches between checkpoints besides those at validations; None: none.
        views: augmentations of each training image; "all" where every epoch has its own.
    """

    batch_size: int
    num_batches: int
    val_every: int
    seed: int
    save_every: int | None = None
    views: int | str = ALL

    @property
    def plan(self) -> dict[str, int | str]:
        """What a batch depends on besides its number: a run resumes under the same plan only."""
        lengths = {"batch_size": self.batch_size, "num_batches": self.num_batches}
        return {"seed": self.seed, **lengths, VIEWS: self.views}


class StageResult(NamedTuple):
    """The final metrics of a stage, without its name, and how they were obtained."""

    metrics: dict[str, float]
    protocol: dict[str, Any]


@dataclass
class TrainingStage:
    """A stage that trains one network, with all that it needs.

    Args:
        module, data: what is trained, and on which images.
        trainer: returns the Trainer; called with the arguments that the stage decides.
        run_dir: checkpoints go to `run_dir / name`, pictures of the result to `run_dir / samples`.
        schedule: lengths of the stage.
        callbacks: further callbacks; one that needs the evaluator is a `functools.partial`.
        loggers: see `fit_stage`.
        config: see `fit_stage`.
        resume: see `var_exp.training.resume.earlier`.
        signals: those of this process.
    """

    module: StageModule
    data: ImageDataModule
    trainer: Callable[..., L.Trainer]
    run_dir: Path
    schedule: StageSchedule
    callbacks: Sequence[Callback | functools.partial[Callback]] = ()
    loggers: Sequence[Callable[..., Logger]] = ()
    config: dict[str, Any] | None = None
    resume: str = "auto"
    signals: SignalHandler | None = None
    is_finished: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return self.module.stage

    def __str__(self) -> str:
        schedule = self.schedule
        return f"{self.name} ({schedule.num_batches:,} batches of {schedule.batch_size} images)"

    def check(self, num_processes: int = 1) -> None:
        """Find what training would refuse, and whether it is finished; nothing is written.

        Raises:
            ValueError: see `check_stage`; or the processes cannot share a batch evenly.
        """
        found = check_stage(self.module, self.run_dir, self.schedule, self.resume)
        self.is_finished = found is not None and is_finished(found.content)
        check_batch_divides(self.name, self.schedule.batch_size, num_processes)

    def restart(self) -> None:
        """Delete what the stage left in the run folder."""
        forget(self.run_dir, self.name)

    def run(self, evaluator: Evaluator) -> StageResult:
        """Train, and measure the best weights."""
        callbacks = [
            c(evaluator) if isinstance(c, functools.partial) else c for c in self.callbacks
        ]
        fitted = fit_stage(
            self.module,
            self.data,
            self.trainer,
            self.schedule,
            run_dir=self.run_dir,
            callbacks=callbacks,
            loggers=self.loggers,
            config=self.config,
            resume=self.resume,
            signals=self.signals,
        )
        scores = self.module.final_scores(evaluator, self.run_dir / "samples")
        metrics = fitted.metrics | scores | {"seconds": fitted.seconds}
        return StageResult(metrics, self.module.protocol(evaluator))


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
    schedule: StageSchedule,
    *,
    run_dir: Path,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Callable[..., Logger]] = (),
    config: dict[str, Any] | None = None,
    resume: str = "auto",
    signals: SignalHandler | None = None,
) -> Fitted:
    """Train a module; leave its network with the best weights that were validated.

    These are of the moving average where the module keeps one.

    Args:
        trainer: returns the Trainer; called with the arguments that this function decides.
        schedule: lengths of the stage.
        run_dir: checkpoints go to `run_dir / module.stage`.
        loggers: each called with `save_dir` and `version`. None of them ends a run by failing.
        config: of the whole run, as plain data, for the loggers.
        resume: what to resume from, see `var_exp.training.resume.earlier`.
        signals: those of this process.

    Raises:
        ValueError: a length below 1, an unknown `resume`, a checkpoint that does not fit.
        Interrupted: a signal came; what was trained is saved.
    """
    folder = run_dir / module.stage
    found = check_stage(module, run_dir, schedule, resume)
    signals = signals or SignalHandler()
    if resume == "never" and is_main_process():
        forget(run_dir, module.stage)
    path, finished, seconds = None, False, 0.0
    if found is not None:
        module.on_load_checkpoint(found.content)
        if is_main_process():
            provide_best(folder, found)
        path, finished = found.path, is_finished(found.content)
        seconds = progress_in(found.content)["seconds"]
        del found  # or the whole checkpoint would stay in memory
    progress = BatchProgress(schedule.plan)
    datamodule.plan(schedule.batch_size, schedule.num_batches)
    guarded = [FaultTolerantLogger(make, str(run_dir), module.stage) for make in loggers]
    with quiet():
        runner = trainer(
            default_root_dir=folder,
            max_epochs=1,  # one Lightning epoch is the whole stage
            check_val_every_n_epoch=None,
            val_check_interval=min(schedule.val_every, schedule.num_batches),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=guarded,
            callbacks=[
                progress,
                *([ThroughputMonitor()] if loggers else []),  # before those that may take long
                *callbacks,
                progress_bar(module.stage),
                Checkpoints(folder, *module.monitor, signals, schedule.save_every),
            ],
            plugins=[ChecksummedFiles()],
        )
        check_precision(runner.precision)
        num_processes = runner.num_devices * runner.num_nodes
        check_batch_divides(module.stage, schedule.batch_size, num_processes)
        own_signals(runner)
        if not finished:
            if config:
                for logger in runner.loggers:
                    logger.log_hyperparams(config)
            with signals.deferred():
                runner.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
            seconds = progress.seconds
            finish(guarded)
        use_best_weights(module, folder)
        runner.logger = None  # the figures of the best weights are no step of training
        results = runner.validate(module, datamodule=datamodule, verbose=False)[0]
        module.to(runner.strategy.root_device)  # Lightning leaves it on the CPU
    metrics = {name.removeprefix("val/"): value for name, value in results.items()}
    return Fitted(metrics, seconds)


def check_stage(
    module: StageModule, run_dir: Path, schedule: StageSchedule, resume: str = "auto"
) -> Found | None:
    """Find what `fit_stage` would refuse, as far as it can be known before earlier stages ran.

    Returns:
        The checkpoint that the stage resumes from, if there is one.

    Raises:
        ValueError: see `fit_stage`.
    """
    save_every = 1 if schedule.save_every is None else schedule.save_every
    lengths = (*schedule[:3], save_every)
    if not all(isinstance(length, int) and length >= 1 for length in lengths):
        raise ValueError(
            f"model.{module.stage}: batch_size, num_batches and val_every must be at least 1, as "
            f"save_every where it is not null, got {schedule.batch_size}, {schedule.num_batches}, "
            f"{schedule.val_every} and {schedule.save_every}"
        )
    module.check_length(schedule.num_batches)
    module.check_optimizers()
    found = earlier(run_dir, module.stage, resume)
    if found is None:
        return None
    module.check_networks(found.content)
    ours = schedule.plan
    theirs = {VIEWS: ALL} | progress_in(found.content)["plan"]  # before there were token caches
    for name, value in theirs.items():
        if ours[name] != value:
            raise ValueError(
                f"resume: the run was started with {name} {value}, now it is {ours[name]}; its "
                f"schedules and images depend on it: keep it, or start in a new run "
                f"folder (run_dir=...), or start over (resume=never)"
            )
    return found


def num_devices(make: Callable[..., L.Trainer]) -> tuple[int, int]:
    """Return the devices of a machine and the machines that a Trainer takes.

    Raises:
        ValueError: Lightning refuses an argument.
    """
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
    return trainer.num_devices, trainer.num_nodes


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision in which quantizer, logits or losses would suffer."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer: precision must be one of {', '.join(PRECISIONS)}, got "
            f"{precision!r}; float16 would need its gradients scaled (trainer.precision)"
        )


def check_batch_divides(stage: str, batch_size: int, num_processes: int) -> None:
    """Raise ValueError unless the processes can share a global batch evenly."""
    if rest := batch_size % num_processes:
        lower = batch_size - rest
        near = f"{lower} or {lower + num_processes}" if lower else str(num_processes)
        raise ValueError(
            f"model.{stage}: the global batch of {batch_size} images does not divide by "
            f"{num_processes} processes; set model.{stage}.batch_size to {near}, or change "
            f"trainer.devices or trainer.num_nodes"
        )


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
    runner._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def finish(loggers: Sequence[FaultTolerantLogger]) -> None:
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
