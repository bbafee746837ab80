"""The two stages of training, and the callbacks around them."""

from var_exp.training.tokenizer_module import TokenizerModule
from var_exp.training.var_module import VARModule

__all__ = ["TokenizerModule", "VARModule"]
