"""How much memory an export takes, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Most memory this process has held; pages of mapped files count while they are mapped.

    Not ru_maxrss where there is a choice: on Linux that includes what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Return freed memory to the system where the C library can (glibc keeps half a gigabyte of layers otherwise)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
