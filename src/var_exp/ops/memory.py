"""Memory that a process keeps for its next tensors.

glibc gives a tensor above 32 MB back to the system when it is freed, and asks for another one for
the next. The system fills each page with zeros at its first touch, which in the decoding of large
maps takes a good part of the time (docs/speed.md). What is kept is used again.
"""

import ctypes
import os
import platform

import torch

# mallopt's parameters (malloc.h) and what they are set to, in bytes. A tensor above KEPT has pages
# of its own as before, and free memory above twice as much at the heap's end goes back.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = 2**30
KEEPING = {MMAP_THRESHOLD: KEPT, TRIM_THRESHOLD: 2 * KEPT - 1, TOP_PAD: 2**26}
BY_ENVIRONMENT = ("MMAP_THRESHOLD", "MMAP_MAX", "TRIM_THRESHOLD", "TOP_PAD")


def keep_memory() -> bool:
    """Let this process keep what tensors of its main thread have freed; whether it does.

    It does not where there is an accelerator, where the C library is not glibc or refuses, nor
    where the environment says how memory is held (`MALLOC_TRIM_THRESHOLD_` and its kin,
    `GLIBC_TUNABLES`). Free memory goes back to the system above 2 GB at the heap's end.
    """
    chosen = any(f"MALLOC_{name}_" in os.environ for name in BY_ENVIRONMENT)
    chosen = chosen or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or torch.accelerator.is_available():
        return False
    return set_parameters(KEEPING)


def set_parameters(values: dict[int, int]) -> bool:
    """Set parameters of glibc in turn, up to the first one that it refuses; whether all are set."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in values.items())
