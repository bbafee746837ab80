"""Which images make up batch b: a pure function of (seed, b), split over ranks.

Lay the epochs end to end, each one permutation of the set given by (seed, epoch). Global
batch b is positions [b * batch_size, (b + 1) * batch_size) of that line; it may span two
epochs, so no batch is ever short. Rank r of R takes every R-th position from the r-th, so
the union over the ranks is the same batch whatever R is.

There is no state to save: a run that stopped after b batches goes on with start_batch=b. The
length stays that of the whole run, because Lightning counts on from b against it; were it the
number of batches left, a run resumed before its middle would end early without a word.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from var_exp.data.source import epoch_order


class GlobalBatchSampler:
    """Yields this rank's share of each global batch, as a list of (epoch, index).

    num_samples: images in one epoch
    batch_size:  images in one global batch, over all ranks
    num_batches: batches in the whole run, those before `start_batch` included
    order:       (seed, epoch) -> the permutation (num_samples,); None for one at random
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_batches: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        order: Callable[[int, int], np.ndarray] | None = None,
    ):
        if num_samples < 1:
            raise ValueError(f"the training set has {num_samples} images, expected at least 1")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"the global batch of {batch_size} images does not divide by {world_size} "
                "processes: choose a batch_size that is a multiple of the number of devices"
            )
        if not 0 <= start_batch <= num_batches:
            raise ValueError(f"cannot start at batch {start_batch} of {num_batches}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self.order = order or functools.partial(epoch_order, num_samples)

    def __len__(self) -> int:
        """Batches in the whole run: a resumed Trainer has already counted the first ones."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start_batch, self.num_batches):
            first = batch * self.batch_size
            items = []
            for position in range(first + self.rank, first + self.batch_size, self.world_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    order = self.order(self.seed, epoch)
                items.append((epoch, int(order[position % self.num_samples])))
            yield items
