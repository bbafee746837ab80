"""What both stages of training share.

A stage is one LightningModule that trains one network: its optimizer, its schedules over the
progress of the stage, gradient clipping, a moving average of the weights, and what its
checkpoint says about itself.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from var_exp.checkpoint import KEY, describe
from var_exp.evaluation.evaluator import Evaluator
from var_exp.training.average import averaged_copy, update_average
from var_exp.training.optim import param_groups


class StageModule(L.LightningModule):
    """Base of `TokenizerModule` and `VARModule`.

    Args:
        optimizer: called with parameter groups, gives the optimizer with its peak rate.
        schedule: progress in [0, 1] -> factor on the peak rate.
        weight_decay: see `param_groups`.
        clip: largest norm of the gradient; 0 does not clip.
        average_decay: of the moving average of the weights; 0 keeps none.
    """

    stage: str
    network_name: str
    #: The validation figure that the best checkpoint is chosen by, and "min" or "max".
    monitor: tuple[str, str]

    def __init__(
        self,
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[float], float],
        weight_decay: float,
        clip: float,
        average_decay: float,
    ):
        super().__init__()
        self.make_optimizer, self.schedule = optimizer, schedule
        self.weight_decay, self.clip, self.average_decay = weight_decay, clip, average_decay

    # -- networks -------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """The networks that the checkpoint must be able to build again."""
        raise NotImplementedError

    @property
    def network(self) -> nn.Module:
        """The network in training."""
        return getattr(self, self.network_name)

    @property
    def evaluated(self) -> nn.Module:
        """The network that validation and sampling use: the average where there is one."""
        return getattr(self, f"averaged_{self.network_name}", self.network)

    def final_scores(self, evaluator: Evaluator, folder: Path) -> dict[str, float]:
        """Measure the finished network, and write its pictures into `folder`."""
        raise NotImplementedError

    def keep_average(self) -> None:
        """Called once the network is in place."""
        if self.average_decay > 0:
            self.add_module(f"averaged_{self.network_name}", averaged_copy(self.network))

    def update_average(self) -> None:
        """Called after each optimizer step."""
        if self.average_decay > 0:
            update_average(self.evaluated, self.network, self.average_decay)

    def train(self, mode: bool = True) -> "StageModule":
        super().train(mode)
        if self.average_decay > 0:
            self.evaluated.eval()
        return self

    # -- optimisation ---------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.make_optimizer(param_groups(self.network, self.weight_decay))
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def on_progress(self, progress: float) -> None:
        """Called before each batch with the share of the stage that is done."""
        factor = self.schedule(progress)
        optimizer = self.optimizers(use_pl_optimizer=False)
        for group, peak in zip(optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def clip_and_log(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = self.clip if self.clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.log("train/grad_norm", norm)

    # -- checkpoints ----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        class_names = list(self.trainer.datamodule.source.class_names)
        checkpoint[KEY] = describe(self.stage, self.networks(), class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_networks(checkpoint)

    def check_networks(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless the checkpoint is of this stage and of networks like these."""
        self.check_equal(checkpoint, "stage", "patch_nums", "networks")

    def check_equal(self, checkpoint: dict[str, Any], *names: str) -> None:
        """Raise ValueError unless the checkpoint says the same of these as this run."""
        theirs = checkpoint[KEY]
        ours = describe(self.stage, self.networks(), theirs["class_names"])
        for name in names:
            for where, a, b in differences(theirs[name], ours[name], name):
                raise ValueError(
                    f"resume: the checkpoint has {where} {a}, this run {b}; continue with the "
                    f"run's own configuration or start in a new run folder"
                )


def differences(theirs: Any, ours: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: (dotted name, their value, our value)."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in theirs | ours:
            yield from differences(theirs.get(key), ours.get(key), f"{name}.{key}")
    elif theirs != ours:
        yield name, theirs, ours
