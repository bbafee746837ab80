"""Tables, paths and sizes as a person reads them."""

import os
from collections.abc import Mapping
from pathlib import Path


def shown_path(path: Path) -> str:
    """A path as a person here would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def table(title: str, rows: Mapping[str, object]) -> str:
    """A short two-column table for the end of a job."""
    width = max(len(name) for name in rows)
    lines = [title, "-" * max(len(title), width + 12)]
    return "\n".join(
        lines + [f"{name:<{width}}  {describe(value)}" for name, value in rows.items()]
    )


def describe(value: object) -> str:
    """A value in four digits, where it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def amount(num_bytes: int) -> str:
    """Bytes as a person reads them; a GB is 10^9."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"
