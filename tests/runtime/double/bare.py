"""What the stand-in driver is told of an engine's kernels. Needs neither Triton nor the exporter."""

from __future__ import annotations

import json
from pathlib import Path

from double.driver import Driver
from par_runtime.backends.engines import ENGINE_JSON, ENGINES
from par_runtime.backends.program import from_json
from par_runtime.checked import Value


def register(driver: Driver, folder: Path) -> None:
    """Tell ``driver`` what the cubins of the engine in ``folder`` are: it knows a cubin by its content."""
    entry = json.loads((folder / ENGINE_JSON).read_text())
    digits = entry["target"].removeprefix("SM")
    for kernel in from_json(Value(entry)["kernels"]).kernels.values():
        driver.register((folder / kernel.file).read_bytes(), kernel, (int(digits[:-1]), int(digits[-1])))


def driver_for(bundle: Path) -> Driver:
    """A driver that knows all engines in ``bundle``, and checks launches, but computes none."""
    driver = Driver()
    for file in bundle.glob(f"{ENGINES}/*/{ENGINE_JSON}"):
        register(driver, file.parent)
    return driver
