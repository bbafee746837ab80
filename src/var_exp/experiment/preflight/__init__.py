"""The check before a big job (`python train.py check=true`); see docs/preflight.md."""

from var_exp.experiment.preflight.check import preflight
from var_exp.experiment.preflight.report import Findings

__all__ = ["Findings", "preflight"]
