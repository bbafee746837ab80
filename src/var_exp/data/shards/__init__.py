"""Images in tar shards, the format of WebDataset: read in an exact order, indexed, written."""

from var_exp.data.shards.dataset import Shards

__all__ = ["Shards"]
