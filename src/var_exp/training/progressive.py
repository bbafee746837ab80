"""Progressive training: start with the first few scales, add the others.

Coarse token maps are learned first, on short and cheap sequences. How many scales are in training
is a function of the batch number alone, so a run that is interrupted anywhere, also at the border
between two numbers of scales, goes on as if nothing had happened. (An option of the code of VAR,
arXiv 2404.02905; the published models were trained without.)
"""

from typing import Annotated, NamedTuple

from annotated_types import Gt, Lt
from pydantic import PositiveInt

from var_exp.configurable import Fraction, checked

Until = Annotated[float, Gt(0), Lt(1)]  # at 1 the last scale would never be trained


class ScalesInTraining(NamedTuple):
    """num_scales: scales in training. weight: of the newest of them, in [0, 1]."""

    num_scales: int
    weight: float


class ProgressiveScales:
    """How many scales are trained, by the progress of the stage.

    The scales after the first ones come in one by one at equal distances, the last at `until`.

    Args:
        first: scales at the start.
        until: share of the stage after which all are in, in (0, 1).
        ramp: share of the stage over which the loss of a new scale rises to its full weight.

    Raises:
        ValueError: an argument out of its range.
    """

    @checked
    def __init__(self, first: PositiveInt = 4, until: Until = 0.5, ramp: Fraction = 0.01):
        self.first, self.until, self.ramp = first, until, ramp

    def check(self, num_scales: int, num_batches: int) -> None:
        """Raise ValueError unless the last scale is reached within the stage."""
        if self.first > num_scales:
            raise ValueError(
                f"progressive: first is {self.first}, but there are {num_scales} scales "
                f"(model.var.progressive.first)"
            )
        reached = self((num_batches - 1) / num_batches, num_scales).num_scales
        if reached < num_scales:
            raise ValueError(
                f"progressive: the last scale would never be trained: at the last of "
                f"{num_batches} batches {reached} of {num_scales} scales are in; lower until="
                f"{self.until} or train longer (model.var.progressive.until)"
            )

    def __call__(self, progress: float, num_scales: int) -> ScalesInTraining:
        to_come = num_scales - self.first
        added = min(int(progress / self.until * to_come + 1e-9), to_come)
        if added == 0 or self.ramp == 0:
            return ScalesInTraining(self.first + added, 1.0)
        since = progress - added * self.until / to_come
        return ScalesInTraining(self.first + added, min(max(since / self.ramp, 0.01), 1.0))
