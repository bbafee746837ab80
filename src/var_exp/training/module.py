"""What both stages of training share.

A stage is one LightningModule that trains one network: its optimizer, its schedules over the
progress of the stage, gradient clipping, a moving average of the weights, and what its
checkpoint says about itself. Optimisation is manual in Lightning's sense, since the adversarial
losses of a tokenizer take two optimizers: one batch is one step of each, whatever the number of
micro-batches that its gradient is summed over.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from var_exp.checkpoint.checkpoint import KEY, check_weights, describe
from var_exp.configurable import Fraction, Weight, checked
from var_exp.data import Batch, CodeBatch, ImageDataModule
from var_exp.evaluation.evaluator import Evaluator
from var_exp.io.files import differences
from var_exp.tokenizer import VQVAE
from var_exp.training.ema import ema_copy, update_ema
from var_exp.training.fsdp import (
    ShardableModule,
    average_whole_gradients,
    clip_gradients,
    parameters_of,
)
from var_exp.training.loggers.guarded import log_scalars
from var_exp.training.nonfinite import SkippedBatches
from var_exp.training.optim import WeightDecay, param_groups

MakeOptimizer = Callable[[list[dict]], Optimizer]
Network = TypeVar("Network", bound=nn.Module)


class StageModule(ShardableModule, Generic[Network]):
    """Base of `TokenizerModule` and `VARModule`.

    Args:
        optimizer: called with parameter groups, gives the optimizer with its peak rate.
        schedule: progress in [0, 1] -> factor on the peak rate.
        weight_decay: see `param_groups`.
        final_weight_decay: where a half cosine leads the decay to; None keeps it constant.
        clip: largest norm of the gradient; 0 does not clip.
        ema_decay: of the moving average of the weights; 0 keeps none.
        weights: "averaged" or "raw": which weights are validated, sampled from and handed on;
            the first falls back to the second where no average is kept.
        micro_batch_size: images that a device takes at once, the gradients of a batch being summed;
            None takes its whole share of the batch. Codebooks that follow features learn from
            each micro-batch, and each draws its own dropout.
        max_skipped: batches in a row without a finite gradient that end the run.

    Raises:
        ValueError: an argument out of its range.
    """

    stage: str
    tokenizer: VQVAE
    #: The validation figure that the best checkpoint is chosen by, and "min" or "max".
    monitor: tuple[str, str]

    @checked
    def __init__(
        self,
        optimizer: MakeOptimizer,
        schedule: Callable[[float], float],
        weight_decay: Weight = 0.0,
        final_weight_decay: Weight | None = None,
        clip: NonNegativeFloat = 1.0,
        ema_decay: Fraction = 0.0,
        weights: str = "averaged",
        micro_batch_size: PositiveInt | None = None,
        max_skipped: PositiveInt = 10,
    ):
        super().__init__()
        self.automatic_optimization = False
        check_weights(weights)
        self.make_optimizer, self.schedule = optimizer, schedule
        self.weight_decay = WeightDecay(weight_decay, final_weight_decay)
        self.clip, self.ema_decay, self.weights = clip, ema_decay, weights
        self.micro_batch_size = micro_batch_size
        self.skipped = SkippedBatches(self.stage, max_skipped)
        self.batch = 0  # the number of the batch in training, set by `on_progress`
        self.figures: dict[str, Tensor | float] = {}  # of that batch, as they are logged

    # -- networks -------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """The networks that the checkpoint must be able to build again."""
        raise NotImplementedError

    @property
    def network(self) -> Network:
        """The network in training."""
        return getattr(self, self.network_name)

    @property
    def evaluated(self) -> Network:
        """The network that validation and sampling use."""
        return self.weight_variants[""]

    @property
    def weight_variants(self) -> dict[str, Network]:
        """What may be scored in training, by the suffix of its keys: "" is what is handed on."""
        averaged = getattr(self, self.average_name, None)
        if averaged is None:
            return {"": self.network}
        if self.weights == "raw":
            return {"": self.network, "_averaged": averaged}
        return {"": averaged, "_raw": self.network}

    @property
    def eval_weights(self) -> str:
        """Which weights are: "averaged", or "raw" also where no average is kept."""
        return self.weights if self.ema_decay > 0 else "raw"

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        """Measure the finished network, and write its pictures into `folder`."""
        raise NotImplementedError

    def protocol(self, evaluator: Evaluator) -> dict[str, Any]:
        """How the final scores were obtained, as plain data."""
        raise NotImplementedError

    def keep_ema(self) -> None:
        """Called once the network is in place."""
        if self.ema_decay > 0:
            self.add_module(self.average_name, ema_copy(self.network))

    def on_fit_start(self) -> None:
        # Lightning leaves networks in the mode it finds them in, and loaded ones come in eval.
        self.train()

    def train(self, mode: bool = True) -> "StageModule":
        super().train(mode)
        if self.ema_decay > 0:
            getattr(self, self.average_name).eval()
        return self

    # -- optimisation ---------------------------------------------------------------------

    def configure_optimizers(self) -> list[Optimizer]:
        optimizers = self.make_optimizers()
        self.peak_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        return optimizers

    def make_optimizers(self) -> list[Optimizer]:
        """That of the network first."""
        return [self.make_optimizer(param_groups(self.network, self.weight_decay.first))]

    def check_optimizers(self) -> None:
        """Raise ValueError where an optimizer refuses its arguments, which would show late."""
        try:
            self.make_optimizers()
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"model.{self.stage}: the optimizer refuses its arguments: {error} "
                f"(model.{self.stage}.optimizer)"
            ) from None

    def on_progress(self, batch: int, num_batches: int) -> None:
        """Called before each batch with its number: set what changes over the stage."""
        self.batch, progress = batch, batch / num_batches
        factor, decay = self.schedule(progress), self.weight_decay(progress)
        optimizers = as_list(self.optimizers(use_pl_optimizer=False))
        for optimizer, peaks in zip(optimizers, self.peak_rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        for group in optimizers[0].param_groups:
            if group["weight_decay"] > 0:
                group["weight_decay"] = decay
        rate = optimizers[0].param_groups[0]["lr"]
        self.figures = {"train/lr": rate, "train/weight_decay": decay}

    @property
    def is_logged(self) -> bool:
        """Whether the loggers get the figures of this batch."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        return every > 0 and (self.batch + 1) % every == 0

    @property
    def workload(self) -> str:
        """A name for how much a batch computes; of another name, it computes more or less."""
        return "whole"

    def check_length(self, num_batches: int) -> None:
        """Raise ValueError where a stage of so many batches cannot do what it is asked to."""

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Micro-batches of tensors (B, ...)."""
        size = self.micro_batch_size or len(tensors[0])
        return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))

    def toggled(self, optimizer: LightningOptimizer, last: bool) -> AbstractContextManager:
        """Gradients for this optimizer's parameters alone; ranks meet at the last micro-batch."""
        return optimizer.toggle_model(sync_grad=last)

    def step(self, optimizer: LightningOptimizer, name: str = "") -> bool:
        """Clip, step unless the gradient is not finite, forget the gradient; whether it stepped.

        All ranks decide the same, since they have the same gradient.
        """
        parameters = parameters_of(optimizer)
        if self.shards:
            average_whole_gradients(parameters)
        norm = clip_gradients(parameters, self.clip if self.clip > 0 else float("inf"))
        finite = bool(norm.isfinite())
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        self.figures[f"train/{name}grad_norm"] = norm
        return finite

    def over_ranks(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over all processes of scalars, in one message."""
        values = torch.stack([value.detach().float().to(self.device) for value in terms.values()])
        values = self.trainer.strategy.reduce(values, reduce_op="mean")
        return dict(zip(terms, values.unbind(), strict=True))

    def update_ema(self) -> None:
        """Called after each step of the network."""
        if self.ema_decay > 0:
            # Until the window of the average is full it is the mean of all weights so far.
            decay = min(self.ema_decay, self.batch / (self.batch + 1))
            averaged = getattr(self, self.average_name)
            update_ema(averaged, self.network, decay)

    def log_step(self, stepped: bool, terms: dict[str, Tensor], batch: Batch | CodeBatch) -> None:
        """Called once after the steps of a batch: log it, and count those that were skipped.

        Not by Lightning's `self.log`, which keeps books on each value in each batch, while the
        loggers get one in many: it took 2 % of a step of the default job.

        Args:
            terms: of the loss, by name, among them "loss".

        Raises:
            ValueError: too many batches in a row had to be skipped.
        """
        self.figures |= {f"train/{name}": value for name, value in terms.items()}
        if self.is_logged:
            log_scalars(self.trainer, self.figures, self.batch)
        message = self.skipped.count(
            stepped, self.batch, terms["loss"], batch.indices, Path(self.trainer.default_root_dir)
        )
        if message:
            self.print(message)

    # -- checkpoints ----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        class_names = list(data_of(self.trainer).source.class_names)
        with self.whole():
            checkpoint[KEY] = describe(self.stage, self.networks(), class_names, self.weights)
        checkpoint["skipped_in_a_row"] = self.skipped.in_a_row

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        with self.whole():
            self.check_networks(checkpoint)
        self.skipped.in_a_row = checkpoint.get("skipped_in_a_row", 0)

    def check_networks(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint is of this stage and of networks like these."""
        self.check_equal(checkpoint, "stage", "patch_nums", "networks")
        ours, theirs = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (self.state_dict(), checkpoint["state_dict"])
        )
        for name, a, b in differences(theirs, ours, "weights"):  # of averages and adversaries
            raise different(name, a, b)

    def check_equal(self, checkpoint: dict[str, Any], *names: str) -> None:
        """Raise ValueError unless the checkpoint says the same of these as this run."""
        theirs = checkpoint[KEY]
        ours = describe(self.stage, self.networks(), theirs["class_names"])
        for name in names:
            for where, a, b in differences(theirs[name], ours[name], name):
                raise different(where, a, b)


def stage_of(module: L.LightningModule) -> StageModule:
    """The module that Lightning passes to a callback, as what all of ours are."""
    return module  # type: ignore[return-value]


def data_of(trainer: L.Trainer) -> ImageDataModule:
    """The data module that a stage is trained and validated with."""
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it at the start


def different(where: str, theirs: Any, ours: Any) -> ValueError:
    return ValueError(
        f"resume: the checkpoint has {where} {theirs}, this run {ours}; continue with the run's "
        f"own configuration, or in a new run folder from its weights (init_from=PATH)"
    )


def as_list(optimizers: Any) -> list:
    """Lightning gives a single optimizer without a list around it."""
    return optimizers if isinstance(optimizers, list) else [optimizers]
