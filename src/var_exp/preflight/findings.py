"""Everything that is wrong, instead of the first thing."""

import sys
from collections.abc import Callable
from typing import Any

from var_exp.cli import first_cause


class Findings:
    """errors: what would end a run, or spoil it; warnings: what a person should know."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def error(self, message: str) -> None:
        if message not in self.errors:  # one mistake may be met twice
            self.errors.append(message)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns; None if it fails, which is noted, and the check goes on."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            ours = isinstance(error, ValueError) or type(error).__module__.startswith("hydra")
            kind = "" if ours else f"{type(error).__name__}: "
            self.error(f"{kind}{first_cause(error)}")
            return None

    def tell(self) -> int:
        """Say all of it on standard error; the exit code, 1 where there are errors."""
        for kind, messages in (("warning", self.warnings), ("error", self.errors)):
            for message in messages:
                print(f"{kind}: {message}", file=sys.stderr)
        counts = {"error": len(self.errors), "warning": len(self.warnings)}
        said = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items()]
        verdict = f"check: {', '.join(said)}"
        print(verdict, flush=True)
        return int(bool(self.errors))
