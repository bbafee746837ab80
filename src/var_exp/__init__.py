"""var-exp: train, sample and measure visual autoregressive models (next-scale prediction)."""

from var_exp.api import build, build_tokenizer, next_scale_prediction, recommended_defaults
from var_exp.official import load_official, official_state_dict, save_official
from var_exp.pipeline import VARPipeline
from var_exp.sampling import generate
from var_exp.scales import ScaleSchedule, total_tokens

__all__ = [
    "ScaleSchedule",
    "VARPipeline",
    "build",
    "build_tokenizer",
    "generate",
    "load_official",
    "next_scale_prediction",
    "official_state_dict",
    "recommended_defaults",
    "save_official",
    "total_tokens",
]
