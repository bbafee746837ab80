"""Whose loader goes on exactly where it stopped: ours and those of the libraries, tried.

    pip install litdata torchdata && python -m benchmarks.continuation

240 numbered samples in 12 blocks, shuffled with a buffer of 48, in batches of 8, each loader as its
library recommends it. Asked of each: does a loader that is made anew, and is given
the state of the one that stopped, go on with the batches that would have come? Do two data workers
give the batches that none gives, and two ranks together the batches of one process? Writes
`benchmarks/results/continuation.json` and prints the table.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import datasets
import litdata
import numpy as np
import pyarrow.parquet as pq
import webdataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.harness import save
from var_exp.data.sampler import GlobalBatchSampler
from var_exp.data.shuffle import block_order
from var_exp.io.environment import machine

COUNT, BLOCKS, BUFFER, BATCH = 240, 12, 48, 8
NUM_BATCHES = COUNT // BATCH
STARTS = (1, 4, 13, 22)  # batches after which a loader is stopped
Batches = list[list[int]]


class WebDataset:
    """Shuffled shards and a shuffle buffer, seeded; there is no state to keep."""

    def __init__(self, folder: Path):
        self.shards = [str(folder / f"{i:03d}.tar") for i in range(BLOCKS)]
        for i, path in enumerate(self.shards):
            with webdataset.TarWriter(path) as writer:
                for number in range(i * COUNT // BLOCKS, (i + 1) * COUNT // BLOCKS):
                    writer.write({"__key__": f"{number:05d}", "cls": number})

    def loader(self, rank: int, ranks: int, workers: int) -> Iterable:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        stream = webdataset.WebDataset(
            self.shards, shardshuffle=BLOCKS, detshuffle=True, nodesplitter=webdataset.split_by_node
        )
        stream = stream.compose(webdataset.detshuffle(BUFFER)).decode().map(lambda s: s["cls"])
        return DataLoader(stream, BATCH // ranks, num_workers=workers)

    state = load = None


class HuggingFace:
    """Streamed parquet, shuffled with its buffer, in torchdata's loader that keeps a state."""

    def __init__(self, folder: Path):
        rows = datasets.Dataset.from_dict({"number": list(range(COUNT))})
        for i in range(BLOCKS):
            path = folder / f"train-{i:03d}.parquet"
            pq.write_table(rows.shard(BLOCKS, i, contiguous=True).data.table, path)
        self.folder = folder

    def loader(self, rank: int, ranks: int, workers: int) -> Iterable:
        stream = datasets.load_dataset(str(self.folder), split="train", streaming=True)
        stream = split_dataset_by_node(stream.shuffle(seed=0, buffer_size=BUFFER), rank, ranks)
        return StatefulDataLoader(
            stream, BATCH // ranks, num_workers=workers, collate_fn=numbers_of_rows
        )

    def state(self, loader):
        return loader.state_dict()

    def load(self, loader, state):
        loader.load_state_dict(state)


def numbers_of_rows(rows: list[dict]) -> list[int]:
    return [row["number"] for row in rows]


class LitData:
    """Chunks of its own, shuffled, in its own loader that keeps a state."""

    def __init__(self, folder: Path):
        self.folder = str(folder / "chunks")
        litdata.optimize(
            int, list(range(COUNT)), self.folder, chunk_size=COUNT // BLOCKS, num_workers=1
        )

    def loader(self, rank: int, ranks: int, workers: int) -> Iterable:
        os.environ |= {"GLOBAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        stream = litdata.StreamingDataset(self.folder, shuffle=True, seed=0)
        return litdata.StreamingDataLoader(
            stream,
            batch_size=BATCH // ranks,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # `optimize` has set spawn: slow
        )

    def state(self, loader):
        return loader.state_dict()

    def load(self, loader, state):
        loader.load_state_dict(state)


class Ours:
    """An order that is an array, and a sampler that begins anywhere in it: no state either."""

    def __init__(self, folder: Path):
        self.blocks = np.arange(COUNT) * BLOCKS // COUNT

    def loader(self, rank: int, ranks: int, workers: int, start: int = 0) -> Iterable:
        sampler = GlobalBatchSampler(
            *(COUNT, BATCH, NUM_BATCHES),
            **{"rank": rank, "world_size": ranks, "start_batch": start},
            order=lambda seed, epoch: block_order(self.blocks, BUFFER, 4, seed, epoch),
        )
        return DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers)

    state = load = None


class Numbers:
    def __getitems__(self, keys: list[tuple[int, int]]) -> list[int]:
        return [number for _, number in keys]


def batches(loader: Iterable) -> Batches:
    return [[int(number) for number in batch] for batch in loader]


def goes_on(library, workers: int) -> str:
    """After how many of `STARTS` a new loader goes on as the one that stopped would."""
    whole, right = batches(library.loader(0, 1, workers)), 0
    for start in STARTS:
        if library.state is None and isinstance(library, Ours):
            again = library.loader(0, 1, workers, start)
        else:
            stopped = library.loader(0, 1, workers)
            for _, _ in zip(range(start), stopped, strict=False):
                pass
            again = library.loader(0, 1, workers)
            if library.load is not None:
                library.load(again, library.state(stopped))
        right += batches(again) == whole[start:]
    return f"{right} of {len(STARTS)}"


def same(ours: Batches, others: Batches) -> bool:
    """Whether the same samples are in the same batches, in whatever order within them."""
    return list(map(sorted, ours)) == list(map(sorted, others))


def ranks_agree(library) -> bool:
    shares = [batches(library.loader(rank, 2, 0)) for rank in range(2)]
    together = [a + b for a, b in zip(*shares, strict=True)]
    return same(together, batches(library.loader(0, 1, 0)))


def tried(question: Callable[[], bool | str]) -> bool | str:
    """The answer, or the error that the library raises."""
    try:
        return question()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1]}"


def answers(library) -> dict[str, bool | str]:
    alone = batches(library.loader(0, 1, 0))
    return {
        "each sample once an epoch": sorted(sum(alone, [])) == list(range(COUNT)),
        "goes on exactly, no workers": tried(lambda: goes_on(library, 0)),
        "goes on exactly, two workers": tried(lambda: goes_on(library, 2)),
        "two workers as none": tried(lambda: same(alone, batches(library.loader(0, 1, 2)))),
        "two ranks as one": tried(lambda: ranks_agree(library)),
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, library in {
            "webdataset": WebDataset,
            "datasets": HuggingFace,
            "litdata": LitData,
            "ours": Ours,
        }.items():
            place = Path(folder) / name
            place.mkdir()
            found[name] = answers(library(place))
            print(name, json.dumps(found[name]), flush=True)
    versions = {name: version(name) for name in ("webdataset", "datasets", "litdata", "torchdata")}
    about = {"machine": machine() | {"libraries": versions}, "results": found}
    save("continuation", about)


if __name__ == "__main__":
    main()
