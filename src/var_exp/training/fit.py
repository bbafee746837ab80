"""Run one stage: loops, checkpoints, bars, and how long it took."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from var_exp.checkpoint import find_checkpoint, read_checkpoint
from var_exp.data import ImageDataModule
from var_exp.training.bars import progress_bar
from var_exp.training.loggers import Guarded
from var_exp.training.monitor import Monitor
from var_exp.training.progress import BatchProgress
from var_exp.training.stage import StageModule

UNFIT_ADVICE = (
    "does not have many workers",  # images in memory need none
    "module\\(s\\) in eval mode",  # the frozen tokenizer and the average are meant to be
    "treespec, LeafSpec",  # Lightning's own use of torch
    "Checkpoint directory",  # resuming writes where it wrote before
    "Experiment logs directory",
    "is smaller than the logging interval",
    "your dataloader is not resumable",  # its batches are a function of their number
)

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
        resume: "auto" goes on from `last.ckpt` where there is one, "never" starts anew.

    Raises:
        ValueError: a length below 1, an unknown `resume`, a checkpoint that does not fit.
    """
    folder = run_dir / module.stage
    earlier = check_stage(module, run_dir, batch_size, num_batches, val_every, seed, resume)
    if earlier is not None:
        module.on_load_checkpoint(earlier)
    progress = BatchProgress(make_plan(seed, batch_size, num_batches))
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
                *([Monitor()] if loggers else []),  # before those that may take long
                *callbacks,
                progress_bar(module.stage),
                best_checkpoint(folder, *module.monitor),
                LastCheckpoint(folder),
            ],
        )
        check_precision(runner.precision)
        if earlier is not None and progress_in(earlier)["batch"] == num_batches:
            seconds = progress_in(earlier)["seconds"]  # nothing is left to train
        else:
            last = None if earlier is None else last_checkpoint(folder)
            begin(runner.loggers, config, anew=resume == "never")
            runner.fit(module, datamodule=datamodule, ckpt_path=last, weights_only=True)
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
    resume: str,
) -> dict[str, Any] | None:
    """Find what `fit_stage` would refuse, as far as it can be known before earlier stages ran.

    Returns:
        The checkpoint that the stage goes on from, if it does.

    Raises:
        ValueError: see `fit_stage`.
    """
    lengths = (batch_size, num_batches, val_every)
    whole = all(isinstance(length, int) and length >= 1 for length in lengths)
    if not whole or resume not in ("auto", "never"):
        raise ValueError(
            f"model.{module.stage}: batch_size, num_batches and val_every must be at least 1 and "
            f"resume 'auto' or 'never', got {batch_size}, {num_batches}, {val_every}, {resume!r}"
        )
    module.check_length(num_batches)
    last = last_checkpoint(run_dir / module.stage)
    if resume == "never" or not last.exists():
        return None
    earlier = read_checkpoint(last)
    module.check_networks(earlier)
    ours = make_plan(seed, batch_size, num_batches)
    for name, value in progress_in(earlier)["plan"].items():
        if ours[name] != value:
            raise ValueError(
                f"resume: the run was started with {name} {value}, now it is {ours[name]}; its "
                f"schedules and order of images depend on it: keep it, or start in a new run "
                f"folder (run_dir=...), or anew (resume=never)"
            )
    return earlier


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision in which quantizer, logits or losses would suffer."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer: precision must be one of {', '.join(PRECISIONS)}, got "
            f"{precision!r}; float16 would need its gradients scaled (trainer.precision)"
        )


def last_checkpoint(folder: Path) -> Path:
    return folder / "last.ckpt"


def make_plan(seed: int, batch_size: int, num_batches: int) -> dict[str, int]:
    """What a batch depends on besides its number."""
    return {"seed": seed, "batch_size": batch_size, "num_batches": num_batches}


def progress_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `BatchProgress` wrote into a checkpoint: batch, seconds, plan."""
    return checkpoint["callbacks"]["BatchProgress"]


def use_best_weights(module: StageModule, folder: Path) -> None:
    """Load the best checkpoint; give its averaged weights, where there are, to the network."""
    module.load_state_dict(read_checkpoint(find_checkpoint(folder))["state_dict"])
    module.network.load_state_dict(module.evaluated.state_dict())
    module.network.eval()


def best_checkpoint(folder: Path, monitor: str, mode: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` after each validation, once the best checkpoint is decided.

    Lightning's own counts optimizer steps, not batches, and saves before it validates: a run
    continued from there would lack that validation.
    """

    def __init__(self, folder: Path):
        self.path = last_checkpoint(folder)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(self.path)


def begin(loggers: Sequence[Guarded], config: Mapping[str, Any] | None, anew: bool) -> None:
    """Tell a stage's loggers what is run; let them forget an earlier training of the stage."""
    for logger in loggers:
        if anew:
            logger.begin_anew()
        if config:
            logger.log_hyperparams(config)


def finish(loggers: Sequence[Guarded]) -> None:
    """Close what a stage's loggers hold open, or the next stage would go on in their runs."""
    for logger in loggers:
        logger.finalize("success")
        logger.finish()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's advertising, and advice that does not hold here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in UNFIT_ADVICE:
                warnings.filterwarnings("ignore", message=f".*{message}")
            yield
    finally:
        logger.setLevel(level)
