"""Batches of codes in the place of batches of images: the same order, the same (epoch, index) keys.

B batch, L tokens
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from var_exp.data.source import CodeBatch
from var_exp.data.tokens.cache import TokenCache


class TrainCodes(Dataset):
    """Codes of training images by (epoch, index), a batch at once.

    stride: of the numbers that images have from one view to the next; 0 where an epoch shows the
        images of the one before.
    """

    def __init__(self, cache: TokenCache, stride: int):
        self.cache, self.stride = cache, stride

    def __getitems__(self, keys: list[tuple[int, int]]) -> CodeBatch:
        epochs, indices = np.asarray(keys).T  # (B,), (B,)
        views = epochs % self.cache.views
        rows = np.empty(len(keys), self.cache.dtype)
        for view in np.unique(views):
            here = views == view
            rows[here] = self.cache.read(int(view), indices[here])
        return code_batch(rows, indices + views * self.stride)


class ValCodes(Dataset):
    """Codes of validation images by index, a batch at once."""

    def __init__(self, cache: TokenCache):
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.key["num_val"]

    def __getitems__(self, indices: list[int]) -> CodeBatch:
        numbers = np.asarray(indices)
        return code_batch(self.cache.read(None, numbers), numbers)


def code_batch(rows: np.ndarray, numbers: np.ndarray) -> CodeBatch:
    codes, labels = rows["codes"].astype(np.int64), rows["label"].astype(np.int64)
    return CodeBatch(*map(torch.from_numpy, (codes, labels, numbers.astype(np.int64))))
