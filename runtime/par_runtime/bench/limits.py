"""What the hardware allows, measured: how fast memory is read, and how fast matrices are multiplied.

One measurement is a :class:`Round`; ``probes.py``, a process of its own, makes it. A run makes several, before, between
and after its subjects (``bounds.py``), because a neighbour on a shared machine comes and goes. Of all rounds the best
counts, since a bound is what is possible without other processes. :func:`of_rounds` also says when even the best may
be too low: no round was quiet, or quiet rounds differ.

An array that fits a cache is read faster than memory, and so are weights that fit a cache. So the bandwidth is measured
at several sizes: that of what a call of the subject reads, and one four times as large as the largest cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from par_runtime.errors import RequestError

SINGLE_THREADED = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
SMALLEST_BYTES, LARGEST_BYTES = 2**22, 2**30
CACHE_TIMES = 4  #: the array that must not fit a cache is this many times as large as the largest cache
#: Of two rounds in which nobody was seen to disturb, the slower one reaches this part of the faster one.
STEADY = 0.9


@dataclass(frozen=True)
class Round:
    """One measurement of the CPU. ``reads``: array size in bytes -> tool -> GB/s; ``peaks``: tool -> TFLOP/s in fp32.

    ``dots``: another arithmetic of the C kernels ("bf16", "int8") -> TFLOP/s. ``flags``: what disturbed it, as
    ``machine.Watch`` says it.
    """

    reads: Mapping[int, Mapping[str, float]]
    peaks: Mapping[str, float]
    flags: tuple[str, ...] = ()
    dots: Mapping[str, float] = field(default_factory=dict)

    @property
    def quiet(self) -> bool:
        """Whether nothing was seen to disturb it."""
        return not any(flag.startswith(("busy", "throttled")) for flag in self.flags)


@dataclass(frozen=True)
class Limits:
    """Measured, or by data sheet, as ``how`` states. GB/s and TFLOP/s (1e9, 1e12).

    ``reads``: pairs of an array size in bytes and the bandwidth at it, ascending. ``matrix_tflop_s`` is None where it
    is not known; bounds are then by bandwidth alone. On a CPU it is of fp32, and ``dots`` are pairs of another
    arithmetic and its peak. ``doubt``: why the device may do more than this, or "".
    """

    reads: tuple[tuple[int, float], ...]
    matrix_tflop_s: float | None
    how: str
    doubt: str = ""
    dots: tuple[tuple[str, float], ...] = ()

    def peak_tflop_s(self, computes: str) -> float | None:
        """The peak for a subject that computes in ``computes``. What is fast in fp32 is as fast in fewer bits."""
        dot = dict(self.dots).get(computes)
        return self.matrix_tflop_s if dot is None else max(dot, self.matrix_tflop_s or 0.0)

    def how_for(self, computes: str) -> str:
        """:attr:`how`, with the arithmetic of :meth:`peak_tflop_s`."""
        if computes not in dict(self.dots):
            return self.how
        return f"{self.how.partition(', and multiply')[0]}, and multiply {computes} matrices (C kernels)"

    def read_gb_s(self, size: float) -> float:
        """Bandwidth for ``size`` bytes that are read again and again: the best of arrays that are not smaller.

        What is read of a larger array in a given time can be read of a smaller one.
        """
        return max((rate for limit, rate in self.reads if limit >= size), default=self.reads[-1][1])

    def better(self, other: Limits) -> Limits:
        """The faster of two measurements at each size, and the higher peak."""
        rates = dict(self.reads)
        for size, rate in other.reads:
            rates[size] = max(rate, rates.get(size, 0.0))
        peaks = [peak for peak in (self.matrix_tflop_s, other.matrix_tflop_s) if peak is not None]
        dots = dict(self.dots)
        for arithmetic, peak in other.dots:
            dots[arithmetic] = max(peak, dots.get(arithmetic, 0.0))
        return Limits(
            tuple(sorted(rates.items())), max(peaks, default=None), self.how, self.doubt, tuple(sorted(dots.items()))
        )


def of_rounds(rounds: Sequence[Round], threads: int) -> Limits:
    """The best of ``rounds``, of which there is at least one, with the reason to doubt it, if any."""
    reads = {
        size: max(((rate, tool) for r in rounds for tool, rate in r.reads.get(size, {}).items()))
        for size in sorted({size for r in rounds for size in r.reads})
    }
    peak, peak_tool = max((rate, tool) for r in rounds for tool, rate in r.peaks.items())
    largest = max(reads)
    often = "once" if len(rounds) == 1 else f"{len(rounds)} times over the run, the best counts"
    how = (
        f"measured {often}: {threads} thread{'s' if threads != 1 else ''} read arrays up to {largest / 1e6:.0f} MB "
        f"({reads[largest][1]}), and multiply fp32 matrices ({peak_tool})"
    )
    dots = {
        name: max(r.dots.get(name, 0.0) for r in rounds) for name in sorted({name for r in rounds for name in r.dots})
    }
    return Limits(
        tuple((size, rate) for size, (rate, _) in reads.items()), peak, how, doubt_of(rounds), tuple(dots.items())
    )


def doubt_of(rounds: Sequence[Round]) -> str:
    """Why the best of ``rounds`` may be below what the machine can do, or ""."""
    quiet = [r for r in rounds if r.quiet]
    if not quiet:
        worst = max((flag.partition(": ")[2] for r in rounds for flag in r.flags), key=len)
        return f"measured while the machine was busy, in all of {len(rounds)} measurements: {worst}"
    if len(quiet) == 1:
        return ""  # it is better than those that were disturbed, or as good
    largest = max(size for r in rounds for size in r.reads)
    for what, values, unit in (
        ("reading", [max(r.reads[largest].values()) for r in quiet], "GB/s"),
        ("multiplying", [max(r.peaks.values()) for r in quiet], "TFLOP/s"),
    ):
        best, second = sorted(values, reverse=True)[:2]
        if second < STEADY * best:
            return f"{what} varied from {min(values):.3g} to {best:.3g} {unit}, though no other process was seen"
    return ""


def array_sizes(working_bytes: Sequence[int], cache_bytes: int | None, available_bytes: int | None) -> list[int]:
    """Array sizes to measure: for each working set the next power of two, and one size that no cache holds.

    The largest is at most 1 GB and an eighth of the memory that is free.
    """
    largest = min(max(2**28, CACHE_TIMES * (cache_bytes or 0)), LARGEST_BYTES)
    if available_bytes is not None:
        largest = max(SMALLEST_BYTES, min(largest, available_bytes // 8))
    own = {max(SMALLEST_BYTES, 1 << (size - 1).bit_length()) for size in working_bytes if size > 0}
    return sorted({size for size in own if size < largest} | {largest})


def measure_cpu(threads: int, array_bytes: Sequence[int], timeout_s: float = 120) -> Round:
    """Measure in a process of its own, at each size of ``array_bytes``. Raises RequestError if it fails."""
    command = [sys.executable, "-m", "par_runtime.bench.probes", str(threads), *map(str, array_bytes)]
    environment = os.environ | SINGLE_THREADED | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environment, check=True
        )
        measured = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RequestError(
            f"this machine's limits could not be measured ({output[-1] if output else error}); --no-limits leaves "
            "them out"
        ) from error
    return Round({int(size): rates for size, rates in measured["reads"]}, measured["peaks"], dots=measured["dots"])
