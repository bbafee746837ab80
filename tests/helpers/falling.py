"""A trial that ends its process, importable by the processes that run trials."""

import os
import signal
import tempfile
from pathlib import Path

import mutations
from mutations import Outcome


def fall(work, item):
    """What a mutant does that ends its process: the one numbered 3."""
    kind, number = item
    place = Path(tempfile.mkdtemp(dir=work, prefix=f"{mutations.BEGUN}{kind}-{number}-"))
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    place.rmdir()
    return Outcome(number, kind, "", "accepted", "")
