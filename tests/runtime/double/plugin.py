"""A pytest plugin that puts the stand-ins everywhere: ``pytest -m gpu -p double.plugin`` tests the GPU tests
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from double import tensorrt
from double.driver import Driver
from par_export.engines import build as engine
from par_export.engines import tune
from par_export.engines.request import BuildRequest
from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINES
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle

stand_in = Driver(memory_bytes=2**34)
cuda.driver = stand_in
trt_module.load = lambda name=None: tensorrt.make(stand_in)  # type: ignore[assignment]


def build(request: BuildRequest, say: Callable[[str], None] = print) -> Path:
    """A stand-in engine in the place of a built one."""
    bundle = Bundle.open(request.bundle)
    folder = tensorrt.write_engine(
        bundle, request.images, request.mode, precision=request.precision or bundle.precision
    )
    label = f"-{request.label}" if request.label else ""
    return folder.rename(bundle.path / ENGINES / f"stand-in-{request.precision}-{request.mode}{label}")


engine.build = build  # type: ignore[assignment]
tune.build = build  # type: ignore[assignment]


def pytest_sessionfinish(session: pytest.Session) -> None:
    leaked = len(stand_in.device) + len(stand_in.executables)
    if leaked and not session.testsfailed:
        session.exitstatus = 1
        print(f"\n{leaked} device allocations or graphs were never freed")
