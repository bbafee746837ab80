"""The sampling loop: scale by scale, with a key/value cache, guidance and filters."""

from var_exp.sampling.generate import (
    Samples,
    check_fit,
    check_settings,
    evaluating,
    generate,
    iterate_samples,
)

__all__ = [
    "Samples",
    "check_fit",
    "check_settings",
    "evaluating",
    "generate",
    "iterate_samples",
]
