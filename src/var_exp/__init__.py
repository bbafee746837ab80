"""var-exp: train, sample and measure visual autoregressive models (next-scale prediction).

Public names are imported when they are first used, so that `var_exp.distributed.signals` can be
imported before anything slow.
"""

import importlib
from typing import Any

_PLACES = {
    "ScaleSchedule": "scales",
    "VARPipeline": "checkpoint.pipeline",
    "build": "api",
    "build_tokenizer": "api",
    "generate": "sampling",
    "keep_memory": "ops.memory",
    "load_official": "checkpoint.official",
    "next_scale_prediction": "api",
    "official_state_dict": "checkpoint.official",
    "recommended_defaults": "api",
    "save_official": "checkpoint.official",
    "total_tokens": "scales",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"var_exp.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'var_exp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
