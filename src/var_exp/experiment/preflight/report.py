"""How the findings of a check are said."""

import math
import sys
from collections.abc import Callable
from typing import Any

from var_exp.experiment.errors import first_cause
from var_exp.experiment.preflight.images import Balance, ImageScan
from var_exp.experiment.preflight.resources import Devices, MemoryEstimate, Parameters
from var_exp.io.text import amount
from var_exp.training.fit import StageSchedule


def millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 100_000 else f"{number:,}"


def network_rows(parameters: dict[str, Parameters]) -> dict[str, str]:
    rows = {}
    for name, numbers in parameters.items():
        kinds = {"trained": numbers.trained, "not trained": numbers.frozen}
        said = [f"{millions(number)} {kind}" for kind, number in kinds.items() if number]
        rows[name] = ", ".join(said)
    return rows


def schedule_rows(
    schedule: StageSchedule, devices: Devices, micro_batch_size: int | None, num_images: int | None
) -> dict[str, str]:
    """Batches, epochs and images seen; how a batch is shared out.

    Args:
        num_images: of an epoch; None where it is not known.
    """
    batch_size, num_batches = schedule.batch_size, schedule.num_batches
    share = batch_size // devices.total
    size = min(micro_batch_size or share, share)
    length = "not known without the images"
    if num_images is not None:
        seen = batch_size * num_batches
        length = f"{num_batches:,}, that is {seen / num_images:,.1f} epochs, {seen:,} images seen"
    return {
        "batches": length,
        "images in a batch": f"{batch_size:,} = {devices.each} devices x {devices.num_nodes} "
        f"machines x {share:,}",
        "of a device": f"{math.ceil(share / size):,} micro-batches of up to {size:,}",
        "validations": f"every {schedule.val_every:,} batches",
    }


def memory_rows(needs: MemoryEstimate, memory: int | None) -> dict[str, str]:
    """What a device holds in training and in validation, and what it is made of."""
    has = "" if memory is None else f" of {amount(memory)}"
    parts = {
        "  weights": needs.weights,
        "  their average": needs.average,
        "  optimizer": needs.moments,
        "  other networks": needs.others,
        "  a step, at most": needs.step,
        "    kept for backward": needs.kept,
        "    gradients": needs.gradients,
    }
    validation = {"  keys and values": needs.sampling, "  whole networks": needs.whole}
    rows = {"memory in training": f"{amount(needs.training)}{has}"}
    rows |= {name: amount(number) for name, number in parts.items() if number}
    rows |= {"memory in validation": f"{amount(needs.validation)}{has}"}
    return rows | {name: amount(number) for name, number in validation.items() if number}


def balance_row(balance: Balance) -> str:
    (low, fewest), (high, most) = balance.smallest, balance.largest
    return f"{fewest:,} ({low}) to {most:,} ({high}) images"


def looked_row(looked: ImageScan) -> str:
    number = len(looked.problems)
    return f"{len(looked.looks):,} of {looked.total:,} looked at, {number:,} of them cannot be used"


class Findings:
    """errors: what would end a run, or spoil it; warnings: what a person should know."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, message: str) -> None:
        if message not in self.errors:  # one mistake may be met twice
            self.errors.append(message)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns; None if it fails, which is noted, and the check goes on."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            ours = isinstance(error, ValueError) or type(error).__module__.startswith("hydra")
            kind = "" if ours else f"{type(error).__name__}: "
            self.error(f"{kind}{first_cause(error)}")
            return None

    def tell(self) -> int:
        """Say all of it on standard error; the exit code, 1 where there are errors."""
        for kind, messages in (("warning", self.warnings), ("error", self.errors)):
            for message in messages:
                print(f"{kind}: {message}", file=sys.stderr)
        counts = {"error": len(self.errors), "warning": len(self.warnings)}
        said = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items()]
        verdict = f"check: {', '.join(said)}"
        print(verdict, flush=True)
        return int(bool(self.errors))
