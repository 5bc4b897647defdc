"""Images in flight when something fails: memory that runs out, a run that raises; and cache rows of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.driver import Driver
from double.fixtures import Make
from test_schedule import BACKENDS, EACH_BACKEND

from par_runtime.backends.base import MakesImages
from par_runtime.backends.native import backend as native_backend
from par_runtime.backends.native.backend import NativeBackend
from par_runtime.backends.ort import gpu
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule

CPUS = [case for case in EACH_BACKEND if case.values != ("opset 23",)]


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """``real``, but its call number ``at`` (from 0) runs out of memory."""
    left = iter(range(at + 1))

    def function(*args: Any, **keywords: Any) -> Any:
        if next(left, None) == at:
            raise MemoryError
        return real(*args, **keywords)

    return function


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, at: int) -> None:
    """The allocation number ``at`` of a cache fails."""
    if isinstance(pipeline.backend, gpu.OrtCudaBackend):
        monkeypatch.setattr(pipeline.backend, "_value", failing(pipeline.backend._value, at))
    elif isinstance(pipeline.backend, NativeBackend):  # one allocation for all layers
        monkeypatch.setattr(native_backend, "empty", failing(native_backend.empty, 0))
    else:
        monkeypatch.setattr(np, "full", failing(np.full, at))


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("backend", CPUS)
def test_after_a_memory_error_requests_of_any_size_are_served(
    backend: str, at: int, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with BACKENDS[backend](bundles["fp32"]) as pipeline:
        wanted = pipeline.generate([0, 3], seed=5).tokens
        for images in (2, 4, 1):
            with monkeypatch.context() as patch:
                run_out_of_memory(patch, pipeline, at if backend != "cpu" else 0)
                with pytest.raises(MemoryError):
                    pipeline.generate([0] * 6, seed=5)
            assert (pipeline.generate([0, 3, 1, 2][:images], seed=5).tokens[:2] == wanted[:images]).all()


def begin_another(pipeline: Pipeline, another: Schedule, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The first call of ``another``, for which there is no memory."""
    tokens = np.zeros((1, pipeline.bundle.n_tokens), np.int64)
    batch, ids, write = another.inputs(another.calls[0], tokens)
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, pipeline, at)
        with pytest.raises(MemoryError):
            pipeline.backend.step(batch, ids, write, another.noise[:, :1])


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("backend", CPUS)
def test_images_in_flight_go_on_when_there_is_no_memory_for_another(
    backend: str, at: int, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with BACKENDS[backend](bundles["fp32"]) as pipeline:
        bundle, settings = pipeline.bundle, [Settings(guidance=2.0)]
        wanted = pipeline.generate([3], settings, seeds=[1]).tokens
        first = Schedule.of(bundle, [3], settings, [1], np.array([1, 0]))
        another = Schedule.of(bundle, [0], settings, [2], np.array([2, 5]))
        pipeline.backend.release()
        tokens = np.zeros_like(wanted)
        for index, (call, batch, ids, write) in enumerate(first.walk(tokens)):
            tokens[:, call.positions] = pipeline.backend.step(batch, ids, write, first.noise[:, call.positions])
            if index == 9:
                begin_another(pipeline, another, monkeypatch, at if backend != "cpu" else 0)
        assert (tokens == wanted).all()
        batch, ids, write = another.inputs(another.calls[0], tokens)
        pipeline.backend.step(batch, ids, write, another.noise[:, :1])  # now there is memory


def test_a_failed_call_for_logits_leaves_no_buffer_bound(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next call would write its logits into memory that was freed."""
    with Pipeline.load(tiny, device="cpu-ort", threads=1, selftest=False) as pipeline:
        schedule = Schedule.of(pipeline.bundle, [0], [Settings()])
        batch, ids, write = schedule.inputs(schedule.calls[0], np.zeros((1, pipeline.bundle.n_tokens), np.int64))
        backend: Any = pipeline.backend
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_step", FailingSession(backend._step))
            with pytest.raises(MemoryError):
                backend.logits(batch, ids, write)
        assert not backend._bound


class FailingSession:
    """A session for which memory runs out in every run."""

    def __init__(self, real: Any) -> None:
        self.io_binding = real.io_binding

    def run_with_iobinding(self, _: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 40")


def test_whole_batches_give_the_same_images_in_any_cache_rows(load: Make, tiny: Path) -> None:
    settings, labels, seeds = [Settings(guidance=2.0), Settings()], [3, 1], [5, 6]
    pipeline = load(tiny, (1, 2, 4))
    wanted = pipeline.generate(labels, settings, seeds=seeds)
    backend = pipeline.backend
    assert isinstance(backend, MakesImages)
    for rows in ([0, 1, 2], [2, 0, 1], [7, 3, 5]):
        schedule = Schedule.of(pipeline.bundle, labels, settings, seeds, np.array(rows))
        tokens, images = backend.make_images(schedule.batch, schedule.class_ids, schedule.noise, True)
        np.testing.assert_array_equal(tokens, wanted.tokens)
        np.testing.assert_array_equal(images, wanted.images)


def test_keys_that_a_gpu_lost_with_its_memory_are_not_taken_for_keys(load: Make, driver: Driver, tiny: Path) -> None:
    """A batch that does not fit frees all memory of the engine; the images that were in flight must begin again."""
    gpu_pipeline, cpu = load(images=(1, 2, 4)), Pipeline.load(tiny, device="cpu-ort", selftest=False)
    wanted = cpu.generate([2], Settings(), seed=3, decode=False).tokens
    backend, bundle = gpu_pipeline.backend, gpu_pipeline.bundle
    schedule = Schedule.of(bundle, [2], [Settings()], [3])
    tokens = np.zeros((1, bundle.n_tokens), np.int64)
    walk = schedule.walk(tokens)
    for _ in range(6):
        call, batch, ids, write = next(walk)
        tokens[:, call.positions] = backend.step(batch, ids, write, schedule.noise[:, call.positions])
    driver.memory_bytes = int(1.2 * sum(a.size for a in driver.device.values()))
    with pytest.raises(MemoryError):
        gpu_pipeline.generate([0] * 4, seed=1, decode=False)
    driver.memory_bytes = 2**33
    call, batch, ids, write = next(walk)
    with pytest.raises(ValueError, match=r"cache rows \[0\] do not hold the keys before positions \[12\]"):
        backend.step(batch, ids, write, schedule.noise[:, call.positions])
    for call, batch, ids, write in schedule.walk(tokens):
        tokens[:, call.positions] = backend.step(batch, ids, write, schedule.noise[:, call.positions])
    assert (tokens == wanted).all()
