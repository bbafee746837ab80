"""Memory that a process keeps for its next tensors.

glibc gives a tensor above 32 MB back to the system when it is freed, and asks for another one for
the next. The system fills each page with zeros at its first touch, which takes about as long as a
convolution of the same map: decoding spends up to half of its time so. What is kept is used again.
"""

import ctypes
import os
import platform

import torch

# mallopt's parameters (malloc.h) and what they are set to, in bytes. A tensor above KEPT has pages
# of its own as before, and free memory above twice as much goes back.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = 2**30
KEEPING = {MMAP_THRESHOLD: KEPT, TRIM_THRESHOLD: 2 * KEPT - 1, TOP_PAD: 2**26}
# What glibc comes to by itself when large tensors are freed, M_MMAP_THRESHOLD of mallopt(3).
USUAL = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26, TOP_PAD: 2**17}


def keep_memory() -> bool:
    """Let this process keep what its tensors have freed, up to 2 GB; whether it does.

    It does not where an accelerator holds the tensors, where the C library is not glibc, nor where
    its environment says how memory is held (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or torch.accelerator.is_available():
        return False
    return _set(KEEPING)


def give_memory_back() -> bool:
    """Hold memory as glibc does by itself, and give back what is free; whether it is so."""
    if not _set(USUAL):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(values: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in values.items()])
