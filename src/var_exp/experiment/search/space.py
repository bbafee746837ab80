"""What a search tries: overrides of several values, in Hydra's words, as Optuna's distributions."""

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


class Options(NamedTuple):
    """What is searched over, by key as an override names it, and the overrides that stay."""

    space: dict[str, BaseDistribution]
    fixed: list[str]

    @property
    def objective(self) -> str:
        """The figure that decides."""
        chosen = [o.partition("=")[2] for o in self.fixed if o.startswith("objective=")]
        return chosen[-1] if chosen else ""


def parse(overrides: Sequence[str]) -> Options:
    """Divide overrides.

    Raises:
        ValueError: one that Hydra does not understand or that cannot be searched over, a key that
            is given twice, nothing to search over, no objective.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(f"search: {' '.join(str(error).split())}") from None
    searched = [override for override in parsed if override.is_sweep_override()]
    fixed = [typed(override) for override in parsed if not override.is_sweep_override()]
    if not searched:
        raise ValueError(
            "search: nothing to search over; expected an override with several values, such as "
            "'model.var.optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
        )
    times = Counter((override.key_or_group, override.package) for override in parsed)
    for override in searched:
        if times[override.key_or_group, override.package] > 1:
            same = [typed(o) for o in parsed if o.key_or_group == override.key_or_group]
            raise ValueError(f"search: expected a key once, got {' and '.join(same)}; type one")
        if override.is_delete() or override.key_or_group in ("run_dir", "hydra/launcher"):
            raise ValueError(f"search: {override.input_line}: this cannot be searched over")
    # Sorted, or keys that come in another order would have each other's random numbers.
    space = {o.get_key_element(): distribution(o) for o in searched}
    options = Options(dict(sorted(space.items())), fixed)
    if not options.objective:
        raise ValueError("search: expected objective=METRIC, such as objective=var/loss")
    return options


def typed(override: Override) -> str:
    """An override as it was typed."""
    return override.input_line or ""


def distribution(override: Override) -> BaseDistribution:
    """The values of an override, as Optuna takes them.

    Ranges are without their end, as Python's; intervals of whole numbers are with it. Choices are
    kept as Hydra would write them, so that null, lists and quoted words come out as they went in.

    Raises:
        ValueError: they cannot be searched over.
    """
    sweep, line = override.value(), typed(override)
    tags: set[str] = getattr(sweep, "tags", set())
    if tags - {"log"} or tags and not isinstance(sweep, IntervalSweep):
        raise ValueError(
            f"search: {line}: expected no tag but log, and only of an interval, got "
            f"{', '.join(sorted(tags))}; type tag(log, interval(1e-4, 1e-2)) or "
            f"tag(log, int(interval(1, 64)))"
        )
    if isinstance(sweep, IntervalSweep):
        return interval(sweep, line)
    if isinstance(sweep, RangeSweep):
        return steps(override, sweep, line)
    if getattr(sweep, "shuffle", False):
        raise ValueError(f"search: {line}: a search has no order; type choice(...)")
    try:
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except HydraException as error:
        raise ValueError(f"search: {line}: {error}; type the values, choice(...)") from None


def interval(sweep: IntervalSweep, line: str) -> BaseDistribution:
    ends: tuple[Any, Any] = sweep.start, sweep.end  # never None, as their types have it
    (low, high), log = ends, "log" in sweep.tags
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"search: {line}: expected two numbers, the smaller one first, got {low} and {high}; "
            f"type interval(0.1, 0.5) or int(interval(2, 8))"
        )
    if log and low <= 0:
        raise ValueError(
            f"search: {line}: expected an interval above 0 for its logarithm, got {low} to {high}; "
            f"type interval({low}, {high}) without the tag, or another start"
        )
    kind = IntDistribution if isinstance(low, int) else FloatDistribution
    return kind(low, high, log=log)


def steps(override: Override, sweep: RangeSweep, line: str) -> BaseDistribution:
    numbers: tuple[Any, Any, Any] = sweep.start, sweep.stop, sweep.step  # never None either
    (start, stop, step), finite = numbers, all(map(math.isfinite, numbers))
    values = list(override.sweep_iterator()) if finite and step else []
    if not values:
        raise ValueError(
            f"search: {line}: expected a range with values in it, got {start} to {stop} in steps "
            f"of {step}; type range(2, 9, 2) for 2, 4, 6, 8, or range(0, 1, 0.25)"
        )
    # In decimals, or 0.1 + 2 * 0.1 would lie beside the steps.
    first, width = Decimal(str(start)), Decimal(str(step))
    low, high = sorted((first, first + width * (len(values) - 1)))
    if all(isinstance(value, int) for value in values):
        return IntDistribution(int(low), int(high), step=int(abs(width)))
    return FloatDistribution(float(low), float(high), step=float(abs(width)))
