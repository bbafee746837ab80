"""The check before a big job (`python train.py check=true`); see docs/preflight.md."""

from var_exp.preflight.check import preflight
from var_exp.preflight.findings import Findings
from var_exp.preflight.job import Job

__all__ = ["Findings", "Job", "preflight"]
