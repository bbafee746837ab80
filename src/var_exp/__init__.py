"""var-exp: train, sample and measure visual autoregressive models (next-scale prediction)."""

from var_exp.api import build, build_tokenizer, next_scale_prediction, recommended_defaults
from var_exp.sampling import generate
from var_exp.scales import ScaleSchedule, total_tokens

__all__ = [
    "ScaleSchedule",
    "build",
    "build_tokenizer",
    "generate",
    "next_scale_prediction",
    "recommended_defaults",
    "total_tokens",
]
