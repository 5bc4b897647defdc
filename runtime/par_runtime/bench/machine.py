"""The machine that a row was measured on, and what disturbed the measurement.

The values come from the operating system. A value that it does not report (in a container, or on a system other than
Linux) stays empty and is never guessed. :class:`Watch` compares counters from before and after a measurement. A row
that other processes or a lowered clock may have changed gets a flag, and keeps it in every file it is written to.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from par_runtime import __version__
from par_runtime.bench.gpu import Gpu, slowed_us, why_slower
from par_runtime.system import available_cores, meminfo_bytes, system_text

BUNDLES, RECIPE = "models/", "models/recipe/"  #: where a checkout has its bundles, and code among them
PROC = Path("/proc")
CPUS = Path("/sys/devices/system/cpu")
#: Shares of the machine's CPU time that others (or the hypervisor) may take before a row is called busy.
BUSY_SHARE, STEAL_SHARE = 0.05, 0.02
#: The system counts CPU time in steps of 10 ms: fewer than three of them prove nothing.
LEAST_SECONDS = 0.03
#: A mean clock below this part of the fastest seen is called throttled.
SLOWER_CLOCK = 0.9
SLOWED_PERCENT = 2.0


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, clocks in MHz; "" or None where the system does not report a value."""

    cpu: str
    cores: int  #: that this process may use
    cache_bytes: int | None  #: the largest level; in a virtual machine, others may share it
    memory_bytes: int | None
    os: str
    cpu_mhz: float | None
    gpu: str
    gpu_driver: str
    gpu_memory_bytes: int | None
    gpu_mhz: float | None
    gpu_memory_mhz: float | None


def describe(gpu: Gpu | None = None) -> Machine:
    """This machine now; ``gpu``: the GPU that the measurement runs on, if any."""
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        cache_bytes=_largest_cache(),
        memory_bytes=meminfo_bytes("MemTotal"),
        os=_os_name(),
        cpu_mhz=_mhz(),
        gpu=gpu.name if gpu else "",
        gpu_driver=gpu.driver if gpu else "",
        gpu_memory_bytes=gpu.memory_bytes if gpu else None,
        gpu_mhz=gpu.mhz if gpu else None,
        gpu_memory_mhz=gpu.memory_mhz if gpu else None,
    )


@cache
def commit() -> str:
    """The commit of the checkout that this package runs from, "-dirty" if changed; else the package's version.

    The variable PARVIS_COMMIT names it for a copy of a checkout that came without its repository. Where there is one,
    that is what is said, whatever the variable says: git has seen the files.
    """
    with suppress(OSError, subprocess.SubprocessError):
        return commit_of(Path(__file__).resolve().parent)
    told = os.environ.get("PARVIS_COMMIT", "")
    return told if re.fullmatch(r"[\w.-]{1,80}", told) else f"parvis {__version__}"


def commit_of(package: Path) -> str:
    """The commit of the checkout that holds the package in the folder ``package``, "-dirty" if it is changed.

    A bundle of :data:`BUNDLES` that was not copied to this machine (docs/gpu.md leaves out three) is no change: no code
    reads it unless it is named, which is an error then, and a row has the hash of the bundle that it was measured on.
    Everything else that is missing is, code above all. Raises OSError, SubprocessError where there is no repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=True
        ).stdout.strip()

    # The repository must hold this file: an installed package may lie in a folder of some other repository.
    git("ls-files", "--error-unmatch", "__init__.py")
    name = git("describe", "--always", "--abbrev=12", "--exclude=*")
    # Each change as its letter and its path from the top of the checkout, all of them followed by a zero byte.
    words = git("-c", "diff.relative=false", "diff", "--name-status", "--no-renames", "-z", "HEAD").split("\0")
    changes = zip(words[::2], words[1::2], strict=False)
    dirty = any(how != "D" or not path.startswith(BUNDLES) or path.startswith(RECIPE) for how, path in changes)
    return f"{name}-dirty" if dirty else name


def debug_reasons() -> list[str]:
    """Why this process is slower than a release: debug builds, or Python's development mode."""
    reasons = []
    if hasattr(sys, "gettotalrefcount"):
        reasons.append("a debug build of Python")
    if sys.flags.dev_mode:
        reasons.append("Python's development mode")
    with suppress(ImportError, AttributeError):
        import onnxruntime

        kind = re.search(r"build type=(\w+)", onnxruntime.get_build_info())
        if kind and kind.group(1) not in ("Release", "RelWithDebInfo", "MinSizeRel"):
            reasons.append(f"onnxruntime is a {kind.group(1)} build")
    return reasons


@dataclass(frozen=True)
class Counters:
    """Seconds of CPU time since boot, summed over cores, and signs of a lowered clock."""

    all_s: float  #: of every core, idle included
    busy_s: float  #: not idle, stolen time left out
    steal_s: float  #: taken by the hypervisor for others
    ours_s: float  #: of this process and the given children
    throttles: int
    mhz: float | None
    load: float | None


def counters(children: tuple[int, ...] = ()) -> Counters | None:
    """The counters now; None where the system does not report them. ``children``: ids of processes to add."""
    try:
        fields = [int(v) for v in system_text(PROC / "stat").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    tick = float(os.sysconf("SC_CLK_TCK"))
    user, nice, system, idle, iowait, irq, softirq, steal = (fields + [0] * 8)[:8]
    ours = sum(os.times()[:4]) + sum(_process_s(child, tick) for child in children)
    busy = user + nice + system + irq + softirq
    return Counters(
        all_s=(busy + idle + iowait + steal) / tick,
        busy_s=busy / tick,
        steal_s=steal / tick,
        ours_s=ours,
        throttles=_throttles(),
        mhz=_mhz(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def disturbances(before: Counters | None, after: Counters | None) -> list[str]:
    """Flags for what happened between two readings: "busy: ...", "throttled: ..."."""
    if before is None or after is None:
        return []
    flags = []
    span = after.all_s - before.all_s
    if span > 0:
        others_s = after.busy_s - before.busy_s - (after.ours_s - before.ours_s)
        stolen_s = after.steal_s - before.steal_s
        others, stolen = others_s / span, stolen_s / span
        load = "" if after.load is None else f", load average {after.load:.1f}"
        if others > BUSY_SHARE and others_s >= LEAST_SECONDS:
            flags.append(f"busy: other processes took {100 * others:.0f} % of the CPU time{load}")
        if stolen > STEAL_SHARE and stolen_s >= LEAST_SECONDS:
            flags.append(f"busy: the hypervisor gave {100 * stolen:.0f} % of the CPU time to others")
    if after.throttles > before.throttles:
        flags.append(f"throttled: the CPU lowered its clock {after.throttles - before.throttles} times for heat")
    if before.mhz and after.mhz and after.mhz < SLOWER_CLOCK * before.mhz:
        flags.append(f"throttled: the CPU's clock fell from {before.mhz:.0f} to {after.mhz:.0f} MHz")
    return flags


class Watch:
    """Watches from its construction to :meth:`flags` what disturbs this process and ``children``."""

    def __init__(self, children: tuple[int, ...] = (), gpu: Gpu | None = None) -> None:
        self._children, self._gpu = children, gpu
        self._before = counters(children)
        self._slowed = None if gpu is None else slowed_us(gpu.index)
        self._began = time.monotonic()

    def flags(self) -> tuple[str, ...]:
        """A flag for each disturbance since construction: "busy: ...", "throttled: ...", "debug: ..."."""
        flags = disturbances(self._before, counters(self._children))
        if self._gpu is not None:
            flags += [f"throttled: {reason}" for reason in self._why_slower(self._gpu.index)]
        return (*flags, *(f"debug: {reason}" for reason in debug_reasons()))

    def _why_slower(self, index: int) -> list[str]:
        """Why the GPU's clock was held down for more than :data:`SLOWED_PERCENT` of the time; of a driver without
        counters, why it is at this moment."""
        after = None if self._slowed is None else slowed_us(index)
        if self._slowed is None or after is None:
            return why_slower(index)
        elapsed = 1e6 * (time.monotonic() - self._began)
        percents = {text: 100 * (after.get(text, us) - us) / elapsed for text, us in self._slowed.items()}
        return [
            f"{text}, {percent:.0f} % of the time" for text, percent in percents.items() if percent > SLOWED_PERCENT
        ]


# -- what the system reports ------------------------------------------------------------------------------------------


@cache
def _cpu_name() -> str:
    with suppress(OSError):
        for line in system_text(PROC / "cpuinfo").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _os_name() -> str:
    with suppress(OSError, AttributeError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}"
    return platform.platform()


@cache
def _largest_cache() -> int | None:
    sizes = []
    for file in CPUS.glob("cpu0/cache/index*/size"):
        with suppress(OSError, ValueError, KeyError):
            text = system_text(file).strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=None)


def _mhz() -> float | None:
    """The mean clock of all cores now."""
    clocks = []
    for file in CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with suppress(OSError, ValueError):
            clocks.append(int(system_text(file)) / 1000)
    if not clocks:
        with suppress(OSError, ValueError):
            lines = system_text(PROC / "cpuinfo").splitlines()
            clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _throttles() -> int:
    """How often cores have lowered their clock for heat since boot."""
    total = 0
    for file in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with suppress(OSError, ValueError):
            total += int(system_text(file))
    return total


def _process_s(pid: int, tick: float) -> float:
    """CPU seconds of a process and of the children it has waited for."""
    with suppress(OSError, ValueError, IndexError):
        after_name = system_text(PROC / str(pid) / "stat").rpartition(")")[2].split()
        return sum(int(v) for v in after_name[11:15]) / tick
    return 0.0
