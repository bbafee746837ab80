"""How every benchmark takes its times: candidates in turn, medians with their spread, one file.

What else a machine does changes from minute to minute, and meets whoever runs at the time. So all
candidates of a benchmark run in one process, once in each round, the round's first one changing
from round to round, and a ratio is taken within a round; the medians over the rounds count, between
their quartiles. What keeps its memory, as our programs do, has rounds of its own after all others,
since a process cannot go back: a ratio to it is one of rounds of the same number, minutes apart.
The machine's limits (`limits.py`) are measured in every round like a candidate.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.limits import CLOCKS, PRECISIONS, Limits, Stopwatch, Work, least
from var_exp.io.environment import machine
from var_exp.ops.memory import keep_memory

FIRST_ROUNDS = 2  # a training step has all the memory that it keeps after the second
# Variables of the environment, by their beginnings.
THAT_MATTER = ("ONEDNN_", "ATEN_CPU", "OMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
KEPT = ", memory kept"  # after the names of candidates, and of limits measured beside them
RESULTS = Path(__file__).resolve().parent / "results"


class Candidate(NamedTuple):
    """One way of doing a piece of work.

    run: does it once. precision: a key of `PRECISIONS`. work: what it has to do at least, None
    where its share of the machine's limit says nothing. keeps_memory: as our programs do.
    """

    name: str
    run: Callable[[], Any]
    precision: str
    work: Work | None = None
    keeps_memory: bool = False


def kept(candidate: Candidate) -> Candidate:
    """The same, in a process that keeps the memory of its tensors."""
    return candidate._replace(name=candidate.name + KEPT, keeps_memory=True)


class Spread(NamedTuple):
    """Median between the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linear between the values (numpy's default)."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return Spread(float(middle), float(low), float(high))


def interleave(
    candidates: Sequence[Candidate],
    limits: Limits,
    repeats: int,
    stopwatch: Stopwatch,
    first_rounds: int = 1,
) -> list[dict[str, float]]:
    """Seconds of each candidate by name, round by round, after first rounds that do not count.

    What `limits` measures comes with each round, under names that `beside` gives.
    """
    for candidate in [*candidates] * first_rounds:
        candidate.run()
    rounds = []
    for number in range(repeats):
        first = number % len(candidates)
        times = {beside(candidates[0], name): x for name, x in limits.measure().items()}
        for candidate in [*candidates[first:], *candidates[:first]]:
            times[candidate.name] = stopwatch(candidate.run)
        rounds.append(times)
    return rounds


def beside(candidate: Candidate, limit: str) -> str:
    """The name of a limit that was measured in the rounds of this candidate."""
    return limit + KEPT if candidate.keeps_memory else limit


def summary(
    candidates: Sequence[Candidate], rounds: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """A row for each candidate; the first one is what the others are compared with.

    seconds; times_as_fast: the first one's seconds over its own; share_of_limit and
    share_of_matrix_product: see `limits.Work`. All but the name are spreads, as dicts.
    """
    rows = []
    for candidate in candidates:
        name, work = candidate.name, candidate.work
        taken = [times[name] for times in rounds]
        base = [times[candidates[0].name] for times in rounds]
        figures = {"seconds": taken}
        figures["times_as_fast"] = [b / t for b, t in zip(base, taken, strict=True)]
        if work is not None:
            names = {n: beside(candidate, n) for n in (candidate.precision, "copy")}
            most = [{n: times[named] for n, named in names.items()} for times in rounds]
            figures["share_of_limit"] = [
                work.seconds_at_least(limits, candidate.precision) / seconds
                for limits, seconds in zip(most, taken, strict=True)
            ]
            figures["share_of_matrix_product"] = [
                work.operations / seconds / limits[candidate.precision]
                for limits, seconds in zip(most, taken, strict=True)
            ]
        row: dict[str, Any] = {"name": name, "precision": candidate.precision}
        row |= {key: spread(values)._asdict() for key, values in figures.items()}
        rows.append(row | ({"work": work._asdict()} if work is not None else {}))
    return rows


def parse(
    description: str,
    arguments: list[str] | None,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The arguments of a benchmark of networks; their number of threads is set.

    Args:
        add: adds those that the benchmark has besides.

    Raises:
        ValueError: processor time of several threads, or of what a GPU does.
    """
    made = parser(description)
    add(made)
    args = made.parse_args(arguments)
    if args.clock == "processor" and (args.threads, args.device) != (1, "cpu"):
        raise ValueError(
            f"benchmarks: processor time is that of one thread of a CPU, got {args.threads} "
            f"threads on {args.device} (--threads 1 --device cpu, or --clock wall)"
        )
    torch.set_num_threads(args.threads)
    return args


def compare(
    works: dict[str, Sequence[Candidate]], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure candidates by the name of the work that they do, which needs no more than the least.

    Those that keep their memory come last; what they ask the system for in their first rounds does
    not count. They are left out where memory cannot be kept.
    """
    stopwatch = Stopwatch(torch.device(args.device), CLOCKS[args.clock])
    rounds: dict[str, list[dict[str, float]]] = {}
    for keeps in (False, True):
        if keeps and not keep_memory():
            works = {work: [c for c in cs if not c.keeps_memory] for work, cs in works.items()}
            break
        for work, candidates in works.items():
            group = [c for c in candidates if c.keeps_memory == keeps]
            if not group:
                continue
            limits = Limits(stopwatch, sorted({c.precision for c in candidates}), args.limit_size)
            first_rounds = FIRST_ROUNDS if keeps else 1
            found = interleave(group, limits, args.repeats, stopwatch, first_rounds)
            before = rounds.get(work, [{}] * args.repeats)
            rounds[work] = [a | b for a, b in zip(before, found, strict=True)]
    return {work: found_of(candidates, rounds[work]) for work, candidates in works.items()}


def found_of(candidates: Sequence[Candidate], rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Limits and candidates of one work, as plain data, with the rounds they are from."""
    common = least([c.work for c in candidates if c.work is not None])
    candidates = [c._replace(work=common if c.work is not None else None) for c in candidates]
    names = rounds[0].keys() - {c.name for c in candidates}
    measured = {name: spread([times[name] for times in rounds]) for name in sorted(names)}
    return {
        "limits": {name: value._asdict() for name, value in measured.items()},
        "candidates": summary(candidates, rounds),
        "rounds": rounds,
    }


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the figures are obtained, as plain data."""
    threads = {"threads": torch.get_num_threads()}
    threads["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    limited = {k: v for k, v in os.environ.items() if k.startswith(THAT_MATTER)}
    date = datetime.now().strftime("%Y-%m-%d %H:%M")
    settings = {k: v for k, v in vars(args).items() if k != "results"}
    return {"machine": machine() | threads | {"environment": limited}, "date": date} | {
        "arguments": settings
    }


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `compare` found of each piece of work, by its name."""
    rows = [["work", "how", "seconds", "times as fast", "share of limit", "of matrix product"]]
    for work, result in found.items():
        for row in result["candidates"]:
            cells = [str(Spread(**row[key])) for key in ("seconds", "times_as_fast")]
            for key in ("share_of_limit", "share_of_matrix_product"):
                cells.append(f"{100 * row[key]['median']:.1f} %" if key in row else "")
            rows.append([work, row["name"], *cells])
    return markdown(rows)


def save(name: str, found: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write results to `<folder>/<name>.json`."""
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def conclude(name: str, args: argparse.Namespace, found: dict[str, Any], checks: dict) -> None:
    """Keep what a benchmark has found and the checks that it passed before, and print both."""
    save(name, about(args) | {"checks": checks, "results": found}, Path(args.results))
    for check, outcome in checks.items():
        print(f"{check}: {outcome}")
    print(table(found))


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of networks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--depth", type=int, default=8, help="of the transformer")
    made.add_argument("--image-size", type=int, default=256, help="pixels, a multiple of 16")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="of ours")
    made.add_argument("--tokenizer-width", type=int, default=160, help="channels, as published")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    made.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: of one thread where others share the CPU (with --threads 1)",
    )
    made.add_argument("--seed", type=int, default=0, help="of weights, images and draws")
    made.add_argument("--limit-size", type=int, default=4096, help="side of the matrix product")
    made.add_argument("--results", default=str(RESULTS), help="folder of the results")
    return made


def in_precision(precision: str, device: str | torch.device) -> torch.autocast:
    """Autocast to the precision, or to none."""
    dtype = PRECISIONS[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


class Unequal(ValueError):
    """Candidates compute different things, so that no ratio of their times means anything."""


def check_close(what: str, plain: Tensor, ours: Tensor, tolerance: float) -> float:
    """The root mean square of the difference over that of `plain`.

    Raises:
        Unequal: it is above the tolerance.
    """
    plain, ours = plain.detach().double(), ours.detach().double()
    size = plain.square().mean().sqrt()
    error = float((plain - ours).square().mean().sqrt() / size)
    if not error <= tolerance:
        raise Unequal(f"{what}: relative difference {error:.3g}, at most {tolerance:g} expected")
    return error
