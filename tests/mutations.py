"""Figures of docs/reliability.md: inputs that are wrong in some way, thousands of them. By hand.

    python tests/mutations.py                       10,000 of all kinds
    python tests/mutations.py configurations --number 500   of one kind

Each mutant is fed to the product within this process. It must be accepted, or refused in one line
that names the key or the file; anything else is a defect: another exception, more than LIMIT
seconds, an unfinished file, or anything new in the folder of results after a refusal. A mutant
is a function of its kind, the seed and its number. The result goes to
benchmarks/results/reliability_mutations.json; the exit code is 1 where there were defects.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from helpers.command import ROOT, TINY, files, run_for_real
from helpers.mutant_files import checkpoints, pictures, records, references, tokens
from helpers.mutant_files import prepare as prepare_files
from helpers.mutants import Mutant, configurations
from var_exp.experiment.errors import first_cause
from var_exp.io.environment import machine

LIMIT = 60  # seconds; the machine may be busy with other things
MEMORY = 12 * 2**30  # bytes of address space: what is too large must not fill the machine
BEGUN = "trial-"  # how folders of mutants that are being judged begin
BETWEEN = 200  # mutants, between two starts of processes
LONGEST = 1500  # characters of a line that says what is wrong
REAL = 0.05  # of the configurations, the share that is run by a process of its own
SHARES = {  # of all mutants, by kind
    "configurations": 0.15,
    "checkpoints": 0.2,
    "images": 0.2,
    "references": 0.2,
    "records": 0.15,
    "tokens": 0.1,
}
FILES = {
    "checkpoints": checkpoints,
    "images": pictures,
    "references": references,
    "records": records,
    "tokens": tokens,
}
REFUSALS = (ValueError, HydraException, OmegaConfBaseException)


class Hang(BaseException):
    """The time is over. No Exception, which the product may catch."""


class Outcome(NamedTuple):
    """verdict: accepted, refused or defect; said: a refusal, or where the defect shows."""

    number: int
    kind: str
    what: str
    verdict: str
    said: str


def judge(mutant: Mutant) -> tuple[str, str]:
    """Feed a mutant to the product: what became of it, and what was said."""
    before = files(mutant.folder) if mutant.folder.exists() else {}
    verdict, said = feed(mutant)
    after = files(mutant.folder) if mutant.folder.exists() else {}
    unfinished = [name for name in after if re.search(r"(^|/)\.[^/]*\.\d+(\.|$)|\.tmp$", name)]
    if unfinished:
        return "defect", f"left {unfinished[0]}"
    if verdict == "refused" and after != before:
        return "defect", f"refused, and left {sorted(after.keys() - before.keys())[:3]}: {said}"
    return verdict, said


def feed(mutant: Mutant) -> tuple[str, str]:
    try:
        with silence(), in_time():
            mutant.feed()
        return "accepted", ""
    except Hang:
        return "defect", f"hangs: {where()}"
    except REFUSALS as error:
        said = first_cause(error)
    except SystemExit as stop:
        said = str(stop.code)
    except Exception as error:
        return "defect", f"{type(error).__name__}: {error}"[:400] + f" ({where()})"
    if "\n" in said.strip() or len(said) > LONGEST:
        return "defect", f"more than a line: {said[:400]!r}"
    if not any(name.lower() in said.lower() for name in mutant.named):
        return "defect", f"names nothing: {said}"
    return "refused", said


def where() -> str:
    """The last places of our own code that the exception in flight went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if str(ROOT / "src") in f.filename or f.filename.count("/") < 5]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in ours[:-4:-1])


@contextlib.contextmanager
def silence():
    """Of everything that the product says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with warnings.catch_warnings(action="ignore"):
            yield


@contextlib.contextmanager
def in_time():
    def over(*_):
        raise Hang

    handler = signal.signal(signal.SIGALRM, over)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def trial(work: Path, seed: int, real: float, item: tuple[str, int]) -> Outcome:
    """One mutant, made and judged in an empty folder."""
    kind, number = item
    draw = random.Random(f"{kind} {seed} {number}")
    torch.manual_seed(number)
    place = Path(tempfile.mkdtemp(dir=work, prefix=f"{BEGUN}{kind}-{number}-"))
    home = os.getcwd()
    os.chdir(place)
    try:
        if kind == "configurations":
            mutant = configurations(draw, place, work / "run", real)
        else:
            mutant = FILES[kind](draw, place, work)
        return Outcome(number, kind, mutant.what, *judge(mutant))
    finally:
        os.chdir(home)
        shutil.rmtree(place, ignore_errors=True)


def start_worker() -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # Read when the libraries are imported, or a run begins.
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    hurry()


def hurry() -> None:
    """The classifier of the evaluation need not be good."""
    import var_exp.evaluation.networks.classifier as classifier

    classifier.NUM_STEPS = 3


def prepare(work: Path) -> None:
    """What mutants are made of: a finished run in work/run."""
    done = run_for_real("train", *TINY, "logger=csv", f"run_dir={work}/run", cwd=work)
    assert done.code == 0, done.err
    prepare_files(work)


def run_all(items: list[tuple[str, int]], seed: int, jobs: int, real: float) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        judge_one = functools.partial(trial, work, seed, real)
        with tqdm(total=len(items), unit="mutant") as bar:
            return judge_all(judge_one, work, items, jobs, bar)


def judge_all(
    judge_one: Callable[[tuple[str, int]], Outcome],
    work: Path,
    items: list[tuple[str, int]],
    jobs: int,
    bar: tqdm,
) -> list[Outcome]:
    """Outcomes of all mutants, of those as well whose process died."""
    outcomes, left = [], list(items)
    while left:
        found, unjudged = judge_some(judge_one, left[:BETWEEN], jobs, bar)
        outcomes, left = outcomes + found, unjudged + left[BETWEEN:]
        # One of those that were being judged when a process died is the one: each by itself.
        for item in suspects(work, unjudged):
            alone, died = judge_some(judge_one, [item], 1, bar)
            outcomes += alone
            outcomes += [Outcome(n, kind, "?", "defect", "its process died") for kind, n in died]
            left.remove(item)
        for folder in work.glob(f"{BEGUN}*"):
            shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def suspects(work: Path, unjudged: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those whose folders were left behind; all of them where there are none."""
    names = [folder.name.removeprefix(BEGUN).split("-") for folder in work.glob(f"{BEGUN}*")]
    found = [(kind, int(number)) for kind, number, *_ in names]
    return [item for item in unjudged if item in found] or list(unjudged)


def judge_some(
    judge_one: Callable[[tuple[str, int]], Outcome],
    items: list[tuple[str, int]],
    jobs: int,
    bar: tqdm,
) -> tuple[list[Outcome], list[tuple[str, int]]]:
    """Outcomes, and the items that have none, since a process died meanwhile."""
    context = multiprocessing.get_context("spawn")
    outcomes, unjudged = [], []
    with ProcessPoolExecutor(jobs, context, start_worker) as pool:
        futures = {pool.submit(judge_one, item): item for item in items}
        for future in as_completed(futures):
            try:
                outcomes.append(future.result())
                bar.update()
            except BrokenProcessPool:
                unjudged.append(futures[future])
    return outcomes, unjudged


def table(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Kind x verdict."""
    rows: dict[str, Counter] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.kind, Counter())[outcome.verdict] += 1
    verdicts = ("accepted", "refused", "defect")
    return {kind: {v: rows[kind][v] for v in verdicts} for kind in SHARES if kind in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=[*SHARES, "all"], default="all")
    parser.add_argument("--number", type=int, default=10_000, help="of mutants, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--real", type=float, default=REAL, help="share of real commands")
    chosen = parser.parse_args()
    shares = SHARES if chosen.kind == "all" else {chosen.kind: 1.0}
    items = [(kind, i) for kind, s in shares.items() for i in range(round(s * chosen.number))]
    random.Random(chosen.seed).shuffle(items)
    started = time.monotonic()
    outcomes = run_all(items, chosen.seed, chosen.jobs, chosen.real)
    found = table(outcomes)
    print(f"{'kind':<20}{'accepted':>10}{'refused':>10}{'defect':>10}")
    for kind, counts in found.items():
        print(f"{kind:<20}" + "".join(f"{count:>10}" for count in counts.values()))
    defects = sorted(o for o in outcomes if o.verdict == "defect")
    for defect in defects:
        print(f"{defect.kind} {defect.number}: {defect.what}\n    {defect.said}")
    result = machine() | {
        "date": time.strftime("%F"),
        "seed": chosen.seed,
        "mutants": len(outcomes),
        "seconds": round(time.monotonic() - started),
        "kinds": found,
        "different": [f"{d.kind} {d.number}: {d.what}: {d.said}" for d in defects],
    }
    if chosen.kind == "all":
        path = ROOT / "benchmarks" / "results" / "reliability_mutations.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(defects))


if __name__ == "__main__":
    main()
