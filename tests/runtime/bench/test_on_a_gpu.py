"""The bench on a GPU, on the stand-ins for driver and TensorRT: phases by events, refusals, nothing left allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from double import tensorrt
from double.driver import Driver

from par_runtime.backends import cuda
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.trt import module as trt_module
from par_runtime.bench import gpu
from par_runtime.bench.bounds import with_bounds
from par_runtime.bench.measure import Setting, measure
from par_runtime.bench.pool import Pool
from par_runtime.bench.subjects.base import info_from_json
from par_runtime.bench.subjects.pipeline import PipelineSubject
from par_runtime.bundle import Bundle
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    stand_in = Driver()
    monkeypatch.setattr(cuda, "driver", stand_in)
    monkeypatch.setattr(trt_module, "load", lambda name=None: tensorrt.make(stand_in))
    yield stand_in
    assert stand_in.device == stand_in.executables == stand_in.events == {}


@pytest.fixture
def subject(driver: Driver, tiny: Path, tmp_path: Path) -> Iterator[PipelineSubject]:
    path = tmp_path / "tiny"
    shutil.copytree(tiny, path)
    tensorrt.write_engine(Bundle.open(path), (1, 2, 4), "shared")
    made = PipelineSubject.load(path, "parvis", device="cuda")
    yield made
    made.close()


def test_each_phase_is_timed_on_the_device(subject: PipelineSubject) -> None:
    rows = measure([subject], Setting("phases", images=2, repetitions=3))
    by = {row.phase: row for row in rows}
    assert {p.name: p.repeat for p in subject.info.architecture.phases} == {
        name: by[name].calls for name in ("prefill", "sequential", "transition", "group")
    }
    assert by["decoder"].calls == 1
    assert by["copy"].calls == 3  # upload of the tables, collection of the tokens, download of tokens and pixels
    assert all(sample > 0 for row in rows for sample in row.samples_ms)
    assert by["image"].clock == "CUDA events"
    assert (by["image"].threads, by["image"].computes) == (None, subject.info.computes)
    assert subject.info.weight_bytes == {"fp16": 2.0, "fp32": 4.0}[subject.info.computes]


def test_timing_the_phases_changes_no_image(subject: PipelineSubject) -> None:
    """Phases are launched as graphs of their own before the image is; both must leave the backend as they found it."""
    wanted = subject.pipeline.generate([1, 2], seed=4).tokens
    subject.run(2, True)
    assert (subject.pipeline.generate([1, 2], seed=4).tokens == wanted).all()


def test_phases_are_captured_once_for_a_batch_size_and_make_the_batch_that_is_given(
    subject: PipelineSubject, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, backend = subject.pipeline, subject.pipeline.backend
    assert isinstance(backend, GpuBackend)
    captured, capture = list[int](), cuda.Stream.capture
    monkeypatch.setattr(cuda.Stream, "capture", lambda self: (captured.append(1), capture(self))[1])
    for labels, seed, new in (([1, 2], 4, True), ([3, 0], 9, False), ([1], 4, True), ([3, 2], 5, False)):
        wanted = pipeline.generate(labels, seed=seed, guidance=2.0).tokens
        captured.clear()
        settings = image_settings(pipeline.bundle, len(labels), guidance=2.0)
        schedule = Schedule.of(pipeline.bundle, labels, settings, [seed + i for i in range(len(labels))])
        given = (schedule.batch, schedule.class_ids, schedule.noise)
        phases = backend.phases(*given)
        assert [(name, calls) for name, calls, _ in phases] == [
            ("copy", 1),
            *((phase.name, phase.repeat) for phase in pipeline.bundle.phases),
            ("copy", 1),
            ("decoder", 1),
            ("copy", 1),
        ]
        assert len(captured) == (len(phases) if new else 0)
        out = backend._prepare(*given, decode=True)[0].out.array
        out[:] = 0
        for _, _, launch in phases:
            launch()
        backend.stream.synchronize()
        assert (out[: wanted.nbytes].view(np.int64) == wanted.flatten()).all()
    executables = len(driver.executables)
    backend._drop_graphs()
    assert executables - len(driver.executables) == 2 * (8 + 1)  # of each batch size: phases, and the whole image
    subject.run(2, True)


def test_an_image_alone_has_no_graph_that_only_a_measurement_needs(
    subject: PipelineSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image of a process is timed as a user waits for it."""
    captured, capture = list[int](), cuda.Stream.capture
    monkeypatch.setattr(cuda.Stream, "capture", lambda self: (captured.append(1), capture(self))[1])
    samples = [subject.image(2, True) for _ in range(2)]
    assert len(captured) == 1  # the whole image, by the first of the two
    assert all(sample.image_ms > 0 and not sample.calls_ms for sample in samples)


def test_a_driver_that_refuses_capture_is_launched_plainly(subject: PipelineSubject, driver: Driver) -> None:
    driver.refuse_capture_over = 0
    sample = subject.run(1, True)
    assert len(sample.calls_ms["group"]) == next(
        p.repeat for p in subject.info.architecture.phases if p.name == "group"
    )
    driver.refuse_capture_over = None


def test_limits_of_a_gpu_state_what_was_measured(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "COPY_BYTES", 2**20)
    assert gpu.copy_gb_s(0, 2**20, 3) > 0
    here = gpu.describe(0)
    limits = gpu.gpu_limits(gpu.Gpu(0, "NVIDIA A100-SXM4-80GB", here.driver, here.memory_bytes, 1410.0, 1593.0))
    assert limits.matrix_tflop_s == 312
    assert "copies of" in limits.how
    assert "matrices by data sheet" in limits.how
    assert "no matrix peak known" in gpu.gpu_limits(here).how


def test_rows_of_a_gpu_are_bounded_by_its_limits(subject: PipelineSubject) -> None:
    from par_runtime.bench.limits import Limits

    rows = measure([subject], Setting("phases", repetitions=2))
    found = {
        row.phase: row
        for row in with_bounds(rows, {"parvis": subject.info}, {0: Limits(((2**28, 2000.0),), 312.0, "x")})
    }
    assert found["group"].bound_ms is not None
    assert found["group"].read_gb_s == 2000.0


def test_a_subjects_info_survives_json(subject: PipelineSubject) -> None:
    from dataclasses import asdict

    assert info_from_json(json.loads(json.dumps(asdict(subject.info)))) == subject.info


def test_a_pool_fills_every_byte_from_another_place_each_time(driver: Driver) -> None:
    numbers = np.random.default_rng(1).integers(1, 250, 1024, np.uint8)  # neither 0 nor what the stand-in fills with
    with cuda.Device.open(0) as device, device.stream() as stream, device.allocate(5000, "x") as memory:
        filled = []
        with Pool(device, stream, numbers) as pool:
            for _ in range(2):
                pool.fill(memory.pointer, 4990)
                stream.synchronize()
                filled.append(driver.span(memory.pointer, 5000, "test").copy())
        with pytest.raises(ValueError, match="100 bytes"):
            Pool(device, stream, numbers[:100])
    assert (filled[0][4990:] == 0xFB).all()
    assert (filled[0][:1024] == numbers).all()
    for one in filled:
        assert (one[:4990] != 0xFB).all()
        assert not (one[:1024] == one[256:1280]).all()
    assert (filled[0][:4990] != filled[1][:4990]).mean() > 0.9


def test_calls_of_a_phase_share_its_time(subject: PipelineSubject) -> None:
    """They are one graph, as in production."""
    calls_ms = subject.run(1, True).calls_ms
    for phase in subject.info.architecture.phases:
        assert len(calls_ms[phase.name]) == phase.repeat
        assert len(set(calls_ms[phase.name])) == 1
    assert len(calls_ms["copy"]) == 3
