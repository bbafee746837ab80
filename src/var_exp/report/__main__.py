"""`python -m var_exp.report RUN...`: write the page of one run, or of runs side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from var_exp.report import write_comparison, write_report
from var_exp.report.run import is_run_folder


def main(arguments: Sequence[str]) -> Path:
    """Write the page that the arguments ask for, and return its path.

    Raises:
        ValueError: a path that is not a run folder, or the same folder twice.
    """
    parser = argparse.ArgumentParser("python -m var_exp.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="where a comparison goes"
    )
    args = parser.parse_args(arguments)
    for path in args.runs:
        if not is_run_folder(path):
            raise ValueError(
                f"report: expected run folders, with .hydra, metrics.json or csv in them, got "
                f"{str(path)!r}"
            )
    if len(args.runs) == 1:
        return write_report(args.runs[0])
    return write_comparison(args.runs, args.out)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
