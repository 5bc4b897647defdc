"""The GPU that is measured: its name and clocks from nvidia-smi, its memory bandwidth from copies on the device.

The matrix peak is the data sheet's: no kernel for it is at hand without a plan. What is measured and what is not is said
in ``Limits.how``.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from par_runtime.backends import cuda

#: Why a GPU runs below its clock, by bit of ``clocks_event_reasons.active``. Idle and a clock that somebody set are not
#: throttling.
REASONS = {
    0x4: "its power limit held the GPU's clock down",
    0x8: "the GPU's hardware lowered its clock",
    0x20: "heat held the GPU's clock down (software limit)",
    0x40: "heat held the GPU's clock down (hardware limit)",
    0x80: "the power supply held the GPU's clock down",
}
COPY_BYTES = 2**28
COPIES = 20


@dataclass(frozen=True)
class Gpu:
    """Clocks in MHz, of now; None where nvidia-smi does not say."""

    index: int
    name: str
    driver: str
    memory_bytes: int | None
    mhz: float | None
    memory_mhz: float | None


def describe(index: int) -> Gpu:
    """GPU ``index`` as the driver counts; clocks where nvidia-smi knows the same GPU. Raises CudaError."""
    with cuda.Device.open(index) as device:
        name, driver, size = device.name, f"CUDA {device.driver_version}", device.total_bytes
    found = _smi(index, "name,driver_version,clocks.sm,clocks.mem")
    # nvidia-smi may count otherwise than the driver (CUDA_VISIBLE_DEVICES): another GPU's clocks would be wrong.
    if found is None or len(found) != 4 or found[0] != name:
        return Gpu(index, name, driver, size, None, None)
    return Gpu(index, name, f"{found[1]}, {driver}", size, _number(found[2]), _number(found[3]))


def why_slower(index: int) -> list[str]:
    """What holds the GPU below its clock at this moment; nothing where nvidia-smi does not say."""
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the second is of older drivers
        found = _smi(index, field)
        if found:
            with suppress(ValueError):
                bits = int(found[0], 16)
                return [text for bit, text in REASONS.items() if bits & bit]
    return []


def copy_gb_s(index: int, size: int = COPY_BYTES, copies: int = COPIES) -> float:
    """Memory bandwidth in GB/s: ``size`` bytes copied on the device, each read once and written once.

    The fastest of ``copies``, timed by events. Raises CudaError.
    """
    with (
        cuda.Device.open(index) as device,
        device.allocate(size, "the bandwidth test") as source,
        device.allocate(size, "the bandwidth test") as target,
        device.stream() as stream,
        device.event() as before,
        device.event() as after,
    ):
        source.zero(stream)
        stream.copy(target.pointer, source.pointer, size)  # not counted: the first use of both
        best_ms = float("inf")
        for _ in range(copies):
            stream.record(before)
            stream.copy(target.pointer, source.pointer, size)
            stream.record(after)
            after.synchronize()
            best_ms = min(best_ms, after.elapsed_ms(before))
        return 2 * size / best_ms / 1e6


def _smi(index: int, query: str) -> list[str] | None:
    """Fields of ``nvidia-smi --query-gpu``; None where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [field.strip() for field in done.stdout.strip().split(",")]


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text)
    return None
