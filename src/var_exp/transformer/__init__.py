"""The next-scale transformer."""

from var_exp.transformer.attention import KVCache
from var_exp.transformer.var import VAR, Condition

__all__ = ["VAR", "Condition", "KVCache"]
