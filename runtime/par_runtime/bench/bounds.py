"""The bound of each row: the least time that the limits of the device allow.

The limits are measured several times over a run (:class:`Gauge`), and the best measurement counts. So rows are made
without a bound and get it here, with a mark where the bound cannot be trusted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from par_runtime.bench import machine
from par_runtime.bench.gpu import Gpu, gpu_limits
from par_runtime.bench.limits import Limits, Round, array_sizes, measure_cpu, of_rounds
from par_runtime.bench.machine import Watch
from par_runtime.bench.measure import Progress, least_work
from par_runtime.bench.rows import ABOVE_BOUND, LIMITS_IN_DOUBT, Row
from par_runtime.bench.subjects.base import SubjectInfo
from par_runtime.cost.bound import bound
from par_runtime.cost.work import largest_read_bytes
from par_runtime.errors import CudaError, RequestError
from par_runtime.system import available_bytes

#: In a table of limits by number of threads, the key of the GPU.
GPU = 0
#: More measurements at the end of a run, while the limits are in doubt, and how long to wait before each of them.
MORE_ROUNDS, WAIT_S = 3, 1.0
#: Between repetitions the limits are measured when this many times the seconds of a measurement have passed.
BETWEEN_TIMES = 6.0


def with_bounds(rows: Iterable[Row], infos: Mapping[str, SubjectInfo], limits: Mapping[int, Limits]) -> list[Row]:
    """``rows`` with the least time that the device's ``limits`` allow; ``infos`` by label.

    ``limits`` by number of threads, :data:`GPU` for the GPU; a row stays as it is if its limits are missing. A row that
    is faster than its bound is marked, and one whose limits are in doubt.
    """
    out = []
    for row in rows:
        allowed = limits.get(GPU if row.threads is None else row.threads)
        work = least_work(infos[row.label], row.images, row.guided, row.phase)
        if allowed is None or not work:
            out.append(row)
            continue
        read = allowed.read_gb_s(max(call.bytes for call in work))
        computes = fastest(row, infos[row.label], allowed)
        peak = allowed.peak_tflop_s(computes)
        least = bound(work, read, peak)
        percent = 100 * least.ms / row.median_ms
        out.append(
            replace(
                row,
                bound_ms=least.ms,
                bound_by=least.by,
                percent_of_bound=percent,
                read_gb_s=read,
                matrix_tflop_s=peak,
                limits_from=allowed.how_for(computes),
                flags=(*row.flags, *bound_flags(percent, allowed)),
            )
        )
    return out


def fastest(row: Row, info: SubjectInfo, limits: Limits) -> str:
    """The precision whose peak bounds ``row``: of whole images the faster one of the model's and the decoder's."""
    if row.phase not in ("image", "throughput"):
        return row.computes
    return max((row.computes, info.decoder_computes), key=lambda computes: limits.peak_tflop_s(computes) or 0.0)


def bound_flags(percent: float, limits: Limits) -> tuple[str, ...]:
    """The flags of a row that reaches ``percent`` of its bound by ``limits``: why the bound says little."""
    flags = [f"{LIMITS_IN_DOUBT}: {limits.doubt}; the device may allow more"] if limits.doubt else []
    if round(percent) > 100:
        why = (
            "the limit was measured while the machine was busy"
            if limits.doubt.startswith("measured while")
            else "the limit was measured too low"
        )
        flags.append(f"{ABOVE_BOUND}: above the bound as measured: {why}, so the row names no limit")
    return tuple(flags)


class Gauge:
    """Measures the limits of one device over a run: :meth:`before`, :meth:`between`, :meth:`after`, then ``limits``.

    ``working_bytes``: number of threads -> the sizes of what calls read; ``gpu``: measured too where it is given.
    ``children``: ids of processes of ours. ``until``: no measurement but the first is begun that would end after it, by
    ``time.monotonic``, if it took as long as the last one.
    """

    def __init__(
        self,
        working_bytes: Mapping[int, Sequence[int]],
        gpu: Gpu | None,
        progress: Progress,
        children: tuple[int, ...] = (),
        until: float = math.inf,
    ) -> None:
        self._until = until
        self._working_bytes, self._gpu, self._progress = working_bytes, gpu, progress
        self._children = children
        self._rounds: dict[int, list[Round]] = {threads: [] for threads in working_bytes}
        self._on_gpu: Limits | None = None
        self._sizes: dict[int, list[int]] = {}
        self.took_s, self._last = 0.0, 0.0

    @staticmethod
    def of(
        infos: Sequence[SubjectInfo],
        batches: Sequence[int],
        guided: bool,
        gpu: Gpu | None,
        progress: Progress,
        children: tuple[int, ...] = (),
    ) -> Gauge:
        """For these subjects, each with its own number of threads, and batches of these sizes."""
        working: dict[int, list[int]] = {}
        for info in infos:
            if info.threads is not None:
                working.setdefault(info.threads, []).extend(
                    largest_read_bytes(info.architecture, images, guided, info.weight_bytes, info.cache_bytes)
                    for images in batches
                )
        on_gpu = any(info.threads is None for info in infos)
        return Gauge(working, gpu if on_gpu else None, progress, children)

    def measure(self) -> None:
        """One measurement. Raises RequestError, CudaError."""
        began = time.monotonic()
        for threads, working in self._working_bytes.items():
            count = len(self._rounds[threads]) + 1
            self._progress(f"this machine's limits with {threads} thread{'s' if threads > 1 else ''}, time {count}")
            if threads not in self._sizes:  # the same in every measurement
                self._sizes[threads] = array_sizes(working, machine.describe().cache_bytes, available_bytes())
            watch = Watch(self._children)
            measured = measure_cpu(threads, self._sizes[threads])
            self._rounds[threads].append(replace(measured, flags=watch.flags()))
        if self._gpu is not None:
            self._progress("this GPU's limits")
            on_gpu = gpu_limits(self._gpu)
            self._on_gpu = on_gpu if self._on_gpu is None else self._on_gpu.better(on_gpu)
        self._last = time.monotonic()
        self.took_s = self._last - began

    def between(self) -> None:
        """A measurement between two repetitions, unless the last one was a short time ago."""
        if time.monotonic() - self._last > BETWEEN_TIMES * self.took_s:
            self._measure_if_possible()

    def after(self) -> None:
        """The last measurement, and more while the limits are in doubt."""
        self._measure_if_possible()
        for _ in range(MORE_ROUNDS):
            if not any(limits.doubt for limits in self.limits().values()):
                return
            if time.monotonic() + WAIT_S + self.took_s > self._until:
                return
            self._progress("this machine's limits once more: the machine is busy, or was")
            time.sleep(WAIT_S)
            self._measure_if_possible()

    def _measure_if_possible(self) -> None:
        """A measurement that may fail: there is an earlier one, and rows that would be lost. None where time is up."""
        if time.monotonic() + self.took_s > self._until:
            return
        try:
            self.measure()
        except (RequestError, CudaError) as error:
            self._progress(str(error))

    def limits(self) -> dict[int, Limits]:
        """The limits by what was measured so far: by number of threads, :data:`GPU` for the GPU."""
        out = {threads: of_rounds(rounds, threads) for threads, rounds in self._rounds.items() if rounds}
        return out if self._on_gpu is None else out | {GPU: self._on_gpu}
