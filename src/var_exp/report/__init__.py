"""`report.html`: all that a run folder holds, on one page that opens anywhere, offline.

One file without scripts, fonts or requests: pictures are embedded, curves are SVG, light and dark
follow the system. `write_report` makes the page of a run; `python -m var_exp.report
RUN_A RUN_B` lays runs side by side.
"""

from var_exp.report.compare import write_comparison
from var_exp.report.page import write_report

__all__ = ["write_comparison", "write_report"]
