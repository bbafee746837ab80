"""In what order to go through images that lie in blocks: tar shards, row groups of parquet files.

An order at random would read a little of every block all the time. Here the blocks come in an
order at random and the images are shuffled within a buffer, as a streaming reader has it, yet
the order is an array that follows from (seed, epoch): nothing is kept, nothing is replayed.

    1. Shuffle the blocks, and the images within each; lay them end to end.
    2. Cut the line into `num_streams` equal pieces.
    3. Shuffle each lane within its share of the buffer: image i goes to i + share * U[0, 1), and
       sorting by that moves no image further than the share.
    4. Deal the num_streams out in turn: position p of the epoch is from lane p mod `num_streams`.

A rank takes every R-th position. So where R divides the number of num_streams, a rank reads its own
blocks and none of the others', although the order does not depend on R.

Letters: N images, R ranks.
"""

import numpy as np

from var_exp.data.source import epoch_order, rng_for


def block_order(
    blocks: np.ndarray, shuffle_buffer: int, num_streams: int, seed: int, epoch: int
) -> np.ndarray:
    """The order (N,) int64 of one epoch, each image once.

    Args:
        blocks: (N,) the block that each image lies in, counted from 0.
        shuffle_buffer: images that are mixed with each other at a time. A set that is not larger is
            shuffled as a whole.
        num_streams: pieces of the line that are read side by side.
    """
    count = len(blocks)
    if count <= shuffle_buffer:
        return epoch_order(count, seed, epoch)
    rng = rng_for(seed, epoch)
    turn = rng.permutation(int(blocks.max()) + 1)
    line = np.lexsort((rng.random(count), turn[blocks]))  # (N,)
    order = np.empty(count, dtype=np.int64)
    for lane, piece in enumerate(np.array_split(line, num_streams)):
        places = np.arange(len(piece)) + shuffle_buffer / num_streams * rng.random(len(piece))
        order[lane::num_streams] = piece[np.argsort(places)]
    return order
