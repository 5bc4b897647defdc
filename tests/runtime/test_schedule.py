"""The walk over an image: calls, ids, rows and noise; and rows that stand at different steps, on every CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_flight import alone, staggered

from par_runtime.backends.ort import gpu
from par_runtime.backends.ort.cpu import OrtBackend
from par_runtime.backends.ort.sessions import OPSET24_SINCE, version
from par_runtime.bundle import Bundle, image_calls
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule, uniforms


def test_the_calls_of_an_image_cover_every_position_once(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    calls = image_calls(bundle.phases)
    assert len(calls) == bundle.calls
    positions = [p for call in calls for p in range(call.positions.start, call.positions.stop)]
    assert positions == list(range(bundle.n_tokens))
    assert [call.phase.name for call in calls[:5]] == [
        "prefill",
        "sequential",
        "sequential",
        "sequential",
        "transition",
    ]
    assert [len(call.phase.token_slots) for call in calls[:6]] == [0, 1, 1, 1, 1, 4]


def test_a_batch_of_guided_and_unguided_images(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    settings = [Settings(guidance=2.0), Settings(), Settings(guidance=3.0, greedy=True)]
    schedule = Schedule.of(bundle, [4, 1, 0], settings, seeds=[7, 8, 9])
    batch = schedule.batch
    assert (batch.rows, batch.images, batch.cache_rows) == (5, 3, 5)
    assert batch.uncond_row.tolist() == [3, 1, 4]
    assert batch.image_of_row.tolist() == [0, 1, 2, 0, 2]
    base, none = bundle.class_base, bundle.no_class
    assert schedule.class_ids.tolist() == [base + 4, base + 1, base, none, none]
    assert batch.guidance.tolist() == [2.0, 1.0, 3.0]
    assert batch.top_k.tolist() == [0, 0, 1]
    assert (schedule.noise[0] == uniforms(7, bundle.n_tokens)).all()
    assert not schedule.noise[2].any()  # greedy
    assert not Schedule.of(bundle, [1], [Settings()]).noise.any()  # no seeds
    assert batch.per_row(np.array([[10], [11], [12]]))[:, 0].tolist() == [10, 11, 12, 10, 12]


def test_every_call_is_fed_its_class_tokens_or_learnable_tokens(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    schedule = Schedule.of(bundle, [2, 3], [Settings(guidance=2.0)] * 2)
    tokens = np.arange(2 * bundle.n_tokens).reshape(2, -1)
    fed = {call.write: (ids, write) for call, _, ids, write in schedule.walk(tokens)}
    assert fed[0][0][:, 0].tolist() == [bundle.class_base + 2, bundle.class_base + 3, bundle.no_class, bundle.no_class]
    assert fed[1][0][:, 0].tolist() == [0, 64, 0, 64]  # one token, to both rows of its image
    transition = bundle.phases[2].inputs
    assert fed[4][0].tolist() == [[t, *transition[1:]] for t in (3, 67, 3, 67)]
    assert fed[8][0][:2].tolist() == [[4, 5, 6, 7], [68, 69, 70, 71]]
    assert fed[8][1].tolist() == [8, 8, 8, 8]


def test_images_at_different_steps_are_fed_each_its_own(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    schedule = Schedule.of(bundle, [2, 3], [Settings(), Settings(guidance=2.0)], cache_row=np.array([5, 0, 2]))
    tokens = np.arange(2 * bundle.n_tokens).reshape(2, -1)
    calls = [schedule.calls[10], schedule.calls[6]]
    batch, ids, write = schedule.inputs(calls, tokens)
    assert write.tolist() == [calls[0].write, calls[1].write, calls[1].write]
    for row, image in enumerate((0, 1, 1)):
        _, alone_ids, _ = schedule.inputs(calls[image], tokens)
        assert (ids[row] == alone_ids[row]).all()
    assert batch is schedule.batch
    assert schedule.batch.cache_rows == 6
    assert schedule.batch.per_image()["cond_row"].tolist() == [5, 0]
    assert schedule.batch.per_image()["uncond_row"].tolist() == [5, 2]


def test_calls_of_different_lengths_cannot_share_a_step(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    schedule = Schedule.of(bundle, [2, 3], [Settings()] * 2)
    tokens = np.zeros((2, bundle.n_tokens), np.int64)
    for calls in (
        [schedule.calls[0], schedule.calls[10]],
        [schedule.calls[10], schedule.calls[0]],
        [schedule.calls[0]],
    ):
        with pytest.raises(ValueError, match="for 2 images; expected a call for each image, all of one query length"):
            schedule.inputs(calls, tokens)


@pytest.mark.parametrize("cache_row", [[3, 3, 1], [0, 1], [0, -1, 2], [0, 1, 2, 3]])
def test_cache_rows_are_different_and_one_for_each_row(tiny: Path, cache_row: list[int]) -> None:
    settings = [Settings(guidance=2.0), Settings()]  # three rows
    with pytest.raises(ValueError, match=r"cache rows \[.*\]; expected 3 different numbers from 0 on, one per row"):
        Schedule.of(Bundle.open(tiny), [2, 3], settings, cache_row=np.array(cache_row))


Open = Callable[[Path], Pipeline]


def on_device_code(path: Path) -> Pipeline:
    """The code for CUDA, on the CPU's provider."""
    bundle = Bundle.open(path)
    return Pipeline(bundle, gpu.OrtCudaBackend(bundle, provider="CPUExecutionProvider", kind="cpu"))


BACKENDS: dict[str, Open] = {
    "cpu": lambda path: Pipeline.load(path, device="cpu", threads=2, selftest=False),
    "cpu-ort": lambda path: Pipeline.load(path, device="cpu-ort", threads=2, selftest=False),
    "opset 23": lambda path: Pipeline(Bundle.open(path), OrtBackend(Bundle.open(path), 2, "step_opset23")),
    "cuda-ort": on_device_code,
}
needs_opset_24 = pytest.mark.skipif(version() < OPSET24_SINCE, reason="this ONNX Runtime does not run step.onnx")
#: All of them take two threads, or as many as there are CPUs.
EACH_BACKEND = [
    pytest.param(name, marks=[pytest.mark.two_cores, *([needs_opset_24] if name == "cuda-ort" else [])])
    for name in BACKENDS
]


@pytest.mark.parametrize("name", ["fp32", pytest.param("n1", marks=pytest.mark.slow), "n16"])
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_rows_at_different_steps_give_the_tokens_of_images_made_alone(
    backend: str, name: str, bundles: dict[str, Path]
) -> None:
    with BACKENDS[backend](bundles[name]) as pipeline:
        wanted = alone(pipeline)
        assert (staggered(pipeline) == wanted).all()
        assert (alone(pipeline) == wanted).all()  # and nothing of it remains


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_positions_beyond_the_last_are_refused(backend: str, bundles: dict[str, Path]) -> None:
    with BACKENDS[backend](bundles["fp32"]) as pipeline:
        schedule = Schedule.of(pipeline.bundle, [0], [Settings()])
        ids = np.zeros((1, 4), np.int64)
        for first in (-1, pipeline.bundle.n_tokens - 3):
            with pytest.raises(ValueError, match=r"a call of 4 positions from .* on; expected positions 0..63"):
                pipeline.backend.step(schedule.batch, ids, np.array([first]), np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_whole_images_between_two_calls_leave_other_cache_rows_alone(backend: str, bundles: dict[str, Path]) -> None:
    with BACKENDS[backend](bundles["fp32"]) as pipeline:
        wanted = pipeline.generate([3], Settings(), seed=7, decode=False).tokens
        schedule = Schedule.of(pipeline.bundle, [3], [Settings()], [7], cache_row=np.array([5]))
        tokens = np.zeros_like(wanted)
        for index, (call, batch, ids, write) in enumerate(schedule.walk(tokens)):
            if index == 9:
                pipeline.generate([0, 1], Settings(guidance=2.0), seed=1, decode=False)  # cache rows 0 to 3
                pipeline.score(wanted, [3])
            noise = schedule.noise[:, call.positions]
            tokens[:, call.positions] = pipeline.backend.step(batch, ids, write, noise)
        assert (tokens == wanted).all()
