"""What the hardware allows, measured: how fast memory is read, and how fast matrices are multiplied.

On a CPU this runs in a process of its own (``python -m par_runtime.bench.limits``), whose environment switches off the
threads of the matrix library. Each thread here reads, or multiplies, a part of its own, so the bench decides the
number of threads and not the library. numpy releases the interpreter's lock while it computes.

Reading: every thread takes the dot product of its part of an array with itself, so each byte is read once. An array
that fits a cache is read faster than memory, and so are weights that fit a cache. So the bandwidth is measured at
several sizes: that of what a call of the subject reads, and one four times as large as the largest cache. The fastest
pass counts, because a bound is what is possible without other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.errors import RequestError

SINGLE_THREADED = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
SMALLEST_BYTES, LARGEST_BYTES = 2**22, 2**30
CACHE_TIMES = 4  #: the array that must not fit a cache is this many times as large as the largest cache
MATRIX = 1536  #: rows and columns; three of 9 MB, larger than what a core has for itself
PASSES = 5
SECONDS = 0.5  #: the passes at one size take at least this long


@dataclass(frozen=True)
class Limits:
    """Measured, or by data sheet, as ``how`` states. GB/s and TFLOP/s (1e9, 1e12).

    ``reads``: pairs of an array size in bytes and the bandwidth at it, ascending. ``matrix_tflop_s`` is None where it
    is not known; bounds are then by bandwidth alone.
    """

    reads: tuple[tuple[int, float], ...]
    matrix_tflop_s: float | None
    how: str

    def read_gb_s(self, size: float) -> float:
        """Bandwidth for ``size`` bytes that are read again and again: that of the next larger array."""
        return next((rate for limit, rate in self.reads if limit >= size), self.reads[-1][1])

    def better(self, other: Limits) -> Limits:
        """The faster of two measurements at each size, and the higher peak: a bound is what is possible."""
        rates = dict(self.reads)
        for size, rate in other.reads:
            rates[size] = max(rate, rates.get(size, 0.0))
        peaks = [peak for peak in (self.matrix_tflop_s, other.matrix_tflop_s) if peak is not None]
        return Limits(tuple(sorted(rates.items())), max(peaks, default=None), self.how)


def array_sizes(working_bytes: Sequence[int], cache_bytes: int | None, available_bytes: int | None) -> list[int]:
    """Array sizes to measure: for each working set the next power of two, and one size that no cache holds.

    The largest is at most 1 GB and an eighth of the memory that is free.
    """
    largest = min(max(2**28, CACHE_TIMES * (cache_bytes or 0)), LARGEST_BYTES)
    if available_bytes is not None:
        largest = max(SMALLEST_BYTES, min(largest, available_bytes // 8))
    own = {max(SMALLEST_BYTES, 1 << (size - 1).bit_length()) for size in working_bytes if size > 0}
    return sorted({size for size in own if size < largest} | {largest})


def measure_cpu(threads: int, array_bytes: Sequence[int], timeout_s: float = 120) -> Limits:
    """Measure in a process of its own, at each size of ``array_bytes``. Raises RequestError if it fails."""
    command = [sys.executable, "-m", "par_runtime.bench.limits", str(threads), *map(str, array_bytes)]
    environment = os.environ | SINGLE_THREADED | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=True)
        measured = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RequestError(
            f"this machine's limits could not be measured ({output[-1] if output else error}); --no-limits leaves "
            "them out"
        ) from error
    reads = tuple((int(size), float(rate)) for size, rate in measured["reads"])
    largest = reads[-1][0] / 1e6
    how = (
        f"measured: {threads} thread{'s' if threads != 1 else ''} read arrays up to {largest:.0f} MB "
        f"(numpy dot products); fp32 matrices of {MATRIX}x{MATRIX} multiplied by numpy's {measured['blas']}"
    )
    return Limits(reads, measured["matrix_tflop_s"], how)


def _seconds(threads: int, work: Callable[[int], Any]) -> float:
    """Seconds from a common start until the last of ``threads`` has done ``work(index)``."""
    start = threading.Barrier(threads + 1)
    ends = [0.0] * threads

    def run(index: int) -> None:
        start.wait()
        work(index)
        ends[index] = time.perf_counter()

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return max(ends) - began


def _fastest(threads: int, work: Callable[[int], Any], seconds: float = SECONDS) -> float:
    """The shortest of several passes, in seconds."""
    took: list[float] = []
    while len(took) < PASSES or sum(took) < seconds:
        took.append(_seconds(threads, work))
    return min(took)


def read_gb_s(threads: int, size: int) -> float:
    """GB/s at which ``threads`` read an array of ``size`` bytes, each a part of it."""
    array = np.empty(size // 4, np.float32)
    parts = np.array_split(array, threads)
    _seconds(threads, lambda i: parts[i].fill(1e-3))  # each thread touches its own part first
    return array.nbytes / _fastest(threads, lambda i: np.dot(parts[i], parts[i])) / 1e9


def matrix_tflop_s(threads: int, side: int = MATRIX) -> float:
    """TFLOP/s of ``threads`` that each multiply two fp32 matrices of ``side`` rows and columns."""
    random = np.random.default_rng(0)
    pairs: list[list[NDArray[np.float32]]] = [
        [random.standard_normal((side, side), np.float32) for _ in range(3)] for _ in range(threads)
    ]
    fastest = _fastest(threads, lambda i: np.matmul(pairs[i][0], pairs[i][1], out=pairs[i][2]))
    return threads * 2 * side**3 / fastest / 1e12


def blas_name() -> str:
    """The library that numpy multiplies with, and its version."""
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    except (KeyError, TypeError):
        return "BLAS"


def main(argv: Sequence[str]) -> int:
    """Measure and print one JSON object: the number of threads and the array sizes in bytes are the arguments."""
    p = argparse.ArgumentParser(prog="python -m par_runtime.bench.limits", description=__doc__)
    p.add_argument("threads", type=int)
    p.add_argument("bytes", type=int, nargs="+")
    args = p.parse_args(argv)
    reads = [(size, read_gb_s(args.threads, size)) for size in args.bytes]
    print(json.dumps({"reads": reads, "matrix_tflop_s": matrix_tflop_s(args.threads), "blas": blas_name()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
