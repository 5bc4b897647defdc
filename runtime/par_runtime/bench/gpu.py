"""The GPU that is measured: its name and clocks from nvidia-smi, its memory bandwidth from copies on the device.

The matrix peak is that of the data sheet, because without an engine there is no kernel to measure it with.
``Limits.how`` states which of the two is measured.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from par_runtime.backends import cuda
from par_runtime.backends.choose import CPUS
from par_runtime.bench.limits import Limits
from par_runtime.bench.pool import Pool
from par_runtime.cost.data_sheets import DATA_SHEETS

#: Why a GPU runs below its clock, by bit of ``clocks_event_reasons.active``. An idle GPU and a clock set by a user do
#: not count as throttling.
REASONS = {
    0x4: "its power limit held the GPU's clock down",
    0x8: "the GPU's hardware lowered its clock",
    0x20: "heat held the GPU's clock down (software limit)",
    0x40: "heat held the GPU's clock down (hardware limit)",
    0x80: "the power supply held the GPU's clock down",
}
#: The same reasons by the field of ``clocks_event_reasons_counters`` that says for how many microseconds in all.
COUNTERS = {
    "sw_power_cap": REASONS[0x4],
    "sw_thermal_slowdown": REASONS[0x20],
    "hw_thermal_slowdown": REASONS[0x40],
    "hw_power_brake_slowdown": REASONS[0x80],
}
COPY_BYTES = 2**28
COPIES = 20


@dataclass(frozen=True)
class Gpu:
    """Clocks in MHz, as they are now; None where nvidia-smi does not report them."""

    index: int
    name: str
    driver: str
    memory_bytes: int | None
    mhz: float | None
    memory_mhz: float | None


def describe(index: int) -> Gpu:
    """GPU ``index`` in the driver's numbering; its clocks where nvidia-smi reports the same GPU. Raises CudaError."""
    with cuda.Device.open(index) as device:
        name, driver, size = device.name, f"CUDA {device.driver_version}", device.total_bytes
    fields = _smi(index, "name,driver_version,clocks.sm,clocks.mem")
    # nvidia-smi may number GPUs differently from the driver (CUDA_VISIBLE_DEVICES); clocks of another GPU are wrong.
    if fields is None or len(fields) != 4 or fields[0] != name:
        return Gpu(index, name, driver, size, None, None)
    return Gpu(index, name, f"{fields[1]}, {driver}", size, _number(fields[2]), _number(fields[3]))


def select(device: str) -> Gpu | None:
    """The GPU that ``--device`` names; for "auto" the first, if there is one; None for a CPU. Raises CudaError."""
    if device in CPUS:
        return None
    index = int(device.partition(":")[2] or 0)
    if device == "auto" and cuda.device_count() == 0:
        return None
    return describe(index)


def gpu_limits(gpu: Gpu) -> Limits:
    """Bandwidth measured by copies; the matrix peak of the data sheet, or None for a GPU without one.

    Raises CudaError.
    """
    rate = copy_gb_s(gpu.index)
    sheets = [sheet for name, sheet in DATA_SHEETS.items() if name.split("-")[0] in gpu.name]
    peak = sheets[0].tflop_s if sheets else None
    how = f"measured: copies of {COPY_BYTES / 1e6:.0f} MB on the device; " + (
        "matrices by data sheet" if sheets else "no matrix peak known for this GPU"
    )
    return Limits(((COPY_BYTES, rate),), peak, how)


def why_slower(index: int) -> list[str]:
    """Why the GPU runs below its clock at this moment; empty where nvidia-smi does not report it."""
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the second is of older drivers
        values = _smi(index, field)
        if values:
            with suppress(ValueError):
                bits = int(values[0], 16)
                return [text for bit, text in REASONS.items() if bits & bit]
    return []


def slowed_us(index: int) -> dict[str, float] | None:
    """Microseconds since the driver was loaded in which each reason held the clock down; None where not reported."""
    values = _smi(index, ",".join(f"clocks_event_reasons_counters.{name}" for name in COUNTERS))
    if values is None or len(values) != len(COUNTERS):
        return None
    found = {text: _number(value) for text, value in zip(COUNTERS.values(), values, strict=True)}
    return {text: value for text, value in found.items() if value is not None} or None


def copy_gb_s(index: int, size: int = COPY_BYTES, copies: int = COPIES) -> float:
    """Memory bandwidth in GB/s: ``size`` bytes copied on the device, each read once and written once.

    The fastest of ``copies``, timed by events. Raises CudaError.
    """
    return 2 * size / min(copies_ms(index, size, copies)) / 1e6


def copies_ms(index: int, size: int, copies: int) -> list[float]:
    """Milliseconds of each of ``copies`` of ``size`` bytes on the device, by events. Raises CudaError."""
    with (
        cuda.Device.open(index) as device,
        device.allocate(size, "the bandwidth test") as source,
        device.allocate(size, "the bandwidth test") as target,
        device.stream() as stream,
    ):
        with Pool(device, stream, np.random.default_rng(0).integers(0, 2**32, 2**20, np.uint32)) as pool:
            pool.fill(source.pointer, size)
        return runs_ms(device, stream, lambda: stream.copy(target.pointer, source.pointer, size), copies)


def runs_ms(
    device: cuda.Device,
    stream: cuda.Stream,
    work: Callable[[], None],
    repeats: int,
    between: Callable[[], None] = lambda: None,
) -> list[float]:
    """Milliseconds of each of ``repeats`` runs of what ``work`` enqueues on ``stream``, by events.

    One more run comes first and is not counted, since the first use of memory takes longer. What ``between`` enqueues
    before each is not timed; meanwhile the host enqueues the rest. Raises CudaError.
    """
    out = []
    with device.event() as before, device.event() as after:
        work()
        for _ in range(repeats):
            between()
            stream.record(before)
            work()
            stream.record(after)
            after.synchronize()
            out.append(after.elapsed_ms(before))
    return out


def _smi(index: int, query: str) -> list[str] | None:
    """The fields that ``nvidia-smi --query-gpu`` prints; None where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [field.strip() for field in done.stdout.strip().split(",")]


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text)
    return None
