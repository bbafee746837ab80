"""Images as the tokenizer's codes: cached in files, and read by stage two."""

from var_exp.data.tokens.cache import TokenCache

__all__ = ["TokenCache"]
