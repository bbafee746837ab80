"""`report.html`: the content of a run folder on one page that opens anywhere, offline.

One file without scripts, fonts or requests: pictures are embedded, curves are SVG, light and dark
follow the system. `write_report` writes the page of a run, `write_comparison` (or `python -m
var_exp.report RUN_A RUN_B`) that of several, side by side.
"""

from var_exp.report.compare import write_comparison
from var_exp.report.page import write_report

__all__ = ["write_comparison", "write_report"]
