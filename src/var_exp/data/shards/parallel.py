"""Many jobs under one progress bar, in this process or in several."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from typing import Any

from tqdm import tqdm

Count = Callable[[int], Any]
_done = None  # in a worker: how far all of them are


def each(
    function: Callable[..., Any], jobs: Sequence[tuple], workers: int, total: int, unit: str
) -> list[Any]:
    """`function(*job, count)` of each job, in the order of the jobs; the first error ends all.

    Args:
        function: of a module, so that other processes find it; calls `count(n)` as it goes on.
        workers: processes; 0 for none besides this one.
        total: what the counts add up to.
        unit: what is counted.
    """
    interval = 0.2 if sys.stderr.isatty() else 30  # seconds between updates; log files keep all
    with tqdm(total=total, unit=f" {unit}s", mininterval=interval) as bar:
        if workers == 0:
            return [function(*job, bar.update) for job in jobs]
        context = multiprocessing.get_context("spawn")  # torch has threads: no forks
        done = context.Value("Q", 0)
        with ProcessPoolExecutor(workers, context, _share, (done,)) as pool:
            futures = [pool.submit(_counting, function, job) for job in jobs]
            pending = set(futures)
            try:
                while pending:
                    finished, pending = wait(pending, 0.5, FIRST_EXCEPTION)
                    bar.update(done.value - bar.n)
                    for future in finished:
                        future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _share(done) -> None:
    global _done
    _done = done


def _counting(function: Callable[..., Any], job: tuple) -> Any:
    return function(*job, _add)


def _add(number: int) -> None:
    with _done.get_lock():
        _done.value += number
