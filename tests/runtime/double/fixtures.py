"""Fixtures of the stand-in GPU: its driver, and bundles loaded on it with stand-in engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from double import bare, tensorrt
from double.driver import Driver
from par_runtime.backends import cuda
from par_runtime.backends.engines import Capture
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle
from par_runtime.pipeline import Pipeline


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A stand-in driver, in place of cuda-python's."""
    stand_in = Driver()
    monkeypatch.setattr(cuda, "driver", stand_in)
    monkeypatch.setattr(trt_module, "load", lambda name=None: tensorrt.make(stand_in))
    return stand_in


Make = Callable[..., Pipeline]


@pytest.fixture
def load(driver: Driver, tmp_path: Path, tiny: Path) -> Iterator[Make]:
    """Load a copy of a bundle with stand-in engines on the stand-in GPU."""
    opened: list[Pipeline] = []

    def make(
        source: Path = tiny,
        images: tuple[int, ...] = (1, 2, 4),
        mode: str = "shared",
        capture: Capture = "image",
        selftest: bool = False,
    ) -> Pipeline:
        path = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, path)
        tensorrt.write_engine(Bundle.open(path), images, mode)
        pipeline = Pipeline.load(path, device="cuda:0", capture=capture, selftest=selftest)
        opened.append(pipeline)
        return pipeline

    yield make
    _close(driver, opened)


@pytest.fixture
def load_kernels(driver: Driver, tmp_path: Path, tiny: Path) -> Iterator[Make]:
    """Load a copy of a bundle with an engine of kernels on the stand-in GPU, which computes them.

    Fresh memory is NaN there. ``target`` is the GPU; the step computes in ``precision``, the decoder in ``decoder``.
    ``change`` is given what was planned before it is written, ``compare`` runs launches in Triton's interpreter too,
    ``many`` as in ``kernels.planned``.
    """
    from double import kernels  # these import Triton, which only some tests need
    from double.twins import Twins

    opened: list[Pipeline] = []
    driver.fill = 0xFF

    def make(
        source: Path = tiny,
        images: tuple[int, ...] = (1, 2, 4),
        target: str = "SM90",
        precision: str = "fp32",
        decoder: str = "fp32",
        capture: Capture = "image",
        selftest: bool = False,
        change: Callable[[Any], None] = lambda planned: None,
        compare: bool = False,
        many: bool = False,
    ) -> Pipeline:
        path = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, path)
        planned = kernels.planned(Bundle.open(path), images, target, precision, decoder, many)
        change(planned)
        bare.register(driver, kernels.write_engine(Bundle.open(path), planned, precision, decoder, target))
        driver.capability = (int(target[2:-1]), int(target[-1]))
        twins = driver.twin = Twins(driver, compare)
        pipeline = Pipeline.load(path, device="cuda:0", capture=capture, selftest=False)
        twins.parts = kernels.Parts(pipeline.backend)
        opened.append(pipeline)
        if selftest:
            pipeline.selftest()
        return pipeline

    yield make
    _close(driver, opened)
    assert not driver.modules, "modules were never unloaded"


def _close(driver: Driver, opened: list[Pipeline]) -> None:
    for pipeline in opened:
        pipeline.close()
    assert not driver.device, f"{len(driver.device)} device allocations were never freed"
    assert not driver.pinned, "pinned memory was never freed"
    assert not driver.executables, "graphs were never freed"


SETTINGS: dict[str, Any] = {"guidance": [1.5, 1.0, 3.0], "top_p": [0.9, 1.0, 1.0], "top_k": [0, 5, 20]}
