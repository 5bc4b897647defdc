"""What the stand-in driver is told of an engine's kernels. Needs neither Triton nor the exporter."""

from __future__ import annotations

from pathlib import Path

from cuda.bindings import driver as real

from double.driver import Driver
from par_runtime.backends.engines import ENGINE_JSON, ENGINES, Engine
from par_runtime.backends.program import Kernel


def register(driver: Driver, folder: Path) -> None:
    """Tell ``driver`` what the cubins of the engine in ``folder`` are: it knows a cubin by its content."""
    engine = Engine.open(folder, verify="none")
    assert engine.kernels is not None
    for kernel in engine.kernels.kernels.values():
        driver.register((folder / kernel.file).read_bytes(), kernel, engine.capability)


class Failing:
    """Computes no kernel; one that writes where nothing is breaks the context of ``driver``."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __call__(self, kernel: Kernel, *_: object) -> None:
        if kernel.source == "card.fault":
            self._driver.broken = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS

    def done(self) -> None:
        """The stream is empty."""


def driver_for(bundle: Path) -> Driver:
    """A driver that knows all engines in ``bundle``, and checks launches, but computes none."""
    driver = Driver()
    for file in bundle.glob(f"{ENGINES}/*/{ENGINE_JSON}"):
        register(driver, file.parent)
    return driver
