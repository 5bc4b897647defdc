"""The bound of each row: the least time that the limits of the device allow.

The limits are measured before and after the rows, and the better measurement counts. So rows are made without a bound
and get it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from par_runtime.bench import machine
from par_runtime.bench.gpu import Gpu, gpu_limits
from par_runtime.bench.limits import Limits, array_sizes, measure_cpu
from par_runtime.bench.measure import Progress, Setting, least_work
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import SubjectInfo
from par_runtime.cost.bound import bound
from par_runtime.cost.work import largest_read_bytes
from par_runtime.system import available_bytes

#: In a table of limits by number of threads, the key of the GPU.
GPU = 0


def with_bounds(rows: Iterable[Row], infos: Mapping[str, SubjectInfo], limits: Mapping[int, Limits]) -> list[Row]:
    """``rows`` with the least time that the device's ``limits`` allow; ``infos`` by label.

    ``limits`` by number of threads, :data:`GPU` for the GPU; a row stays as it is if its limits are missing.
    """
    out = []
    for row in rows:
        allowed = limits.get(GPU if row.threads is None else row.threads)
        work = least_work(infos[row.label], row.images, row.guided, row.phase)
        if allowed is None or not work:
            out.append(row)
            continue
        read = allowed.read_gb_s(max(call.bytes for call in work))
        least = bound(work, read, allowed.matrix_tflop_s)
        out.append(
            replace(
                row,
                bound_ms=least.ms,
                bound_by=least.by,
                percent_of_bound=100 * least.ms / row.median_ms,
                read_gb_s=read,
                matrix_tflop_s=allowed.matrix_tflop_s,
                limits_from=allowed.how,
            )
        )
    return out


def measure_limits(infos: Sequence[SubjectInfo], setting: Setting, progress: Progress) -> dict[int, Limits]:
    """The limits of the device, by number of threads; :data:`GPU` for the GPU. Raises RequestError, CudaError."""
    out: dict[int, Limits] = {}
    for threads in {info.threads for info in infos if info.threads is not None}:
        progress(f"this machine's limits with {threads} threads")
        working_sets = [
            largest_read_bytes(i.architecture, setting.images, setting.guided, i.weight_bytes, i.cache_bytes)
            for i in infos
            if i.threads == threads
        ]
        out[threads] = cpu_limits(threads, working_sets)
    if setting.gpu is not None and any(info.threads is None for info in infos):
        out[GPU] = gpu_limits(setting.gpu)
    return out


def cpu_limits(threads: int, working_bytes: Sequence[int]) -> Limits:
    """The limits of this CPU for ``threads`` that read ``working_bytes`` again and again. Raises RequestError."""
    return measure_cpu(threads, array_sizes(working_bytes, machine.describe().cache_bytes, available_bytes()))


def device_limits(threads: int, gpu: Gpu | None) -> Limits:
    """The limits of the GPU, or of this CPU without one, for models of more than a gigabyte.

    Raises RequestError, CudaError.
    """
    return cpu_limits(threads, [10**9]) if gpu is None else gpu_limits(gpu)
