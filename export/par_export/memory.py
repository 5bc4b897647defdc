"""How much memory an export takes and may take, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


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


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = CGROUP) -> int:
    """Memory this process may still take without anything being paged out; 0 where the system does not say."""
    try:
        free = int((proc / "meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0
    groups = proc / "self" / "cgroup"
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            top, limit, used, prefix = cgroup, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used, prefix = cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        own = top / path.strip("/")
        # A container's limit stands in the topmost folder it sees, a batch job's in one of those above its own.
        for folder in (own, *own.parents):
            free = min(free, _room(folder, limit, used, prefix))
            if folder == top:
                break
    return max(free, 0)


def _room(folder: Path, limit: str, used: str, prefix: str) -> int:
    """What a control group leaves; very much where it has no limit. Cached files count as used, and make room."""
    try:
        room = int((folder / limit).read_text()) - int((folder / used).read_text())  # "max" is no limit
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return room + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    except (OSError, ValueError):
        return sys.maxsize
