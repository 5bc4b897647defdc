"""The TensorRT backend on a stand-in GPU: tokens as on the CPU, and every rule of the hardware kept.

The stand-ins are in ``double/``: what runs here is all of ``backends/trt``, ``backends/gpu`` and
``cuda.py``; only the driver and TensorRT's runtime are not the real ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double.driver import Driver
from double.fixtures import SETTINGS, Make
from in_flight import alone, staggered

from par_runtime.backends.engines import Capture, Engine
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.gpu.tables import Tables
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule


@pytest.mark.parametrize("capture", ["image", "call", "none"])
@pytest.mark.parametrize("mode", ["shared", "per-phase"])
def test_tokens_and_images_are_those_of_the_cpu(
    load: Make, tiny: Path, driver: Driver, mode: str, capture: Capture
) -> None:
    gpu, cpu = load(mode=mode, capture=capture), Pipeline.load(tiny, device="cpu", selftest=False)
    for _ in range(2):  # the second time everything is captured and warm
        for labels, settings in (([2], {"guidance": 2.0}), ([0, 3, 5], SETTINGS)):
            got, wanted = (p.generate(labels, seed=11, **settings) for p in (gpu, cpu))
            np.testing.assert_array_equal(got.tokens, wanted.tokens)
            np.testing.assert_array_equal(got.images, wanted.images)
    assert gpu.backend.capturing == capture  # type: ignore[attr-defined]
    launches = {"image": 4, "call": None, "none": 0}[capture]
    if launches is not None:
        assert driver.counts.get("launch", 0) == launches  # an image is one launch
    if capture == "image":
        # One for each batch size, kept; the first was captured again when the larger one had moved the caches.
        assert driver.counts["instantiate"] == 3


@pytest.mark.parametrize("name", ["n1", "fp32", "n16"])
def test_every_group_size(load: Make, bundles: dict[str, Path], name: str) -> None:
    gpu, cpu = load(bundles[name]), Pipeline.load(bundles[name], device="cpu", selftest=False)
    for labels in ([1], [4, 0, 7]):
        got, wanted = (p.generate(labels, seed=3, guidance=1.7, top_p=0.9) for p in (gpu, cpu))
        np.testing.assert_array_equal(got.tokens, wanted.tokens)


def test_one_synchronisation_per_image(load: Make, driver: Driver) -> None:
    gpu = load()
    gpu.generate([0], seed=1)
    before = driver.counts["synchronize"]
    gpu.generate([0], seed=2)
    assert driver.counts["synchronize"] == before + 1


def test_greedy_selftest_passes_and_a_swapped_class_fails(load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load(selftest=True)
    real = Tables.fill_single

    def other_class(
        self: Tables, block: Any, index: int, query: int, batch: Any, ids: Any, write: Any, uniform: Any
    ) -> None:
        real(self, block, index, query, batch, ids + (write == 0)[:, None], write, uniform)

    monkeypatch.setattr(Tables, "fill_single", other_class)
    with pytest.raises(Exception, match="self-test failed on tensorrt_rtx"):
        gpu.selftest()


def test_previews_and_single_calls(load: Make, tiny: Path) -> None:
    gpu, cpu = load(), Pipeline.load(tiny, device="cpu", selftest=False)
    shown: dict[str, list[np.ndarray]] = {"gpu": [], "cpu": []}
    results = {}
    for name, pipeline in (("gpu", gpu), ("cpu", cpu)):
        results[name] = pipeline.generate(
            [1, 2, 3],
            seed=5,
            guidance=2.0,
            preview_every=6,
            on_preview=lambda i, d, t, name=name: shown[name].append(i),
        )
    np.testing.assert_array_equal(results["gpu"].tokens, results["cpu"].tokens)
    np.testing.assert_array_equal(np.stack(shown["gpu"]), np.stack(shown["cpu"]))
    np.testing.assert_array_equal(gpu.decode(results["cpu"].tokens), results["cpu"].images)


def test_logits_are_those_of_the_cpu(load: Make, tiny: Path) -> None:
    gpu, cpu = load(), Pipeline.load(tiny, device="cpu", selftest=False)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    got = {}
    for name, pipeline in (("gpu", gpu), ("cpu", cpu)):
        schedule = Schedule.of(pipeline.bundle, [0, 1, 2], [Settings(guidance=1.5)] * 3)
        got[name] = [pipeline.backend.logits(batch, ids, write) for _, batch, ids, write in schedule.walk(tokens)]
    for a, b in zip(got["gpu"], got["cpu"], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("images", [(4,), (1, 2, 4)])
@pytest.mark.parametrize("mode", ["shared", "per-phase"])
def test_rows_at_different_steps_give_the_tokens_of_images_made_alone(
    load: Make, bundles: dict[str, Path], mode: str, images: tuple[int, ...]
) -> None:
    """With profiles of 1, 2 and 4 images the caches move to larger ones while images are in flight."""
    gpu, cpu = load(bundles["fp32"], images, mode), Pipeline.load(bundles["fp32"], device="cpu-ort", selftest=False)
    wanted = alone(cpu)
    assert (staggered(gpu) == wanted).all()
    assert (alone(gpu) == wanted).all()


def test_batches_beyond_the_engine_are_split(load: Make, tiny: Path) -> None:
    gpu, cpu = load(images=(1, 2)), Pipeline.load(tiny, device="cpu", selftest=False)
    labels = [0, 1, 2, 3, 4]
    got, wanted = (p.generate(labels, seed=9) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.images, wanted.images)
    with pytest.raises(RequestError, match="max_batch 3: expected 1 to 2 on tensorrt_rtx"):
        gpu.generate(labels, max_batch=3)


def test_refused_capture_falls_back_to_calls_then_to_none(load: Make, tiny: Path, driver: Driver) -> None:
    wanted = Pipeline.load(tiny, device="cpu", selftest=False).generate([1], seed=4)
    driver.refuse_capture_over = 10  # a call fits, an image does not
    gpu = load()
    np.testing.assert_array_equal(gpu.generate([1], seed=4).tokens, wanted.tokens)
    assert gpu.backend.capturing == "call"  # type: ignore[attr-defined]
    driver.refuse_capture_over = 0
    gpu = load()
    np.testing.assert_array_equal(gpu.generate([1], seed=4).tokens, wanted.tokens)
    assert gpu.backend.capturing == "none"  # type: ignore[attr-defined]


def test_compiled_kernels_are_kept_beside_the_plan(load: Make) -> None:
    gpu = load()
    gpu.generate([0], seed=1)
    folder = gpu.backend.engine.path  # type: ignore[attr-defined]
    assert {p.name for p in folder.glob("*.cache")} == {"step.runtime.cache", "decoder.runtime.cache"}
    Engine.open(folder, gpu.bundle, verify="full")  # they are no part of what is checked


def test_memory_stays_constant_over_many_images(load: Make, driver: Driver) -> None:
    gpu = load()
    gpu.generate([0, 1, 2], seed=0)
    held = sum(a.size for a in driver.device.values()), len(driver.pinned), len(driver.executables)
    for seed in range(10):
        gpu.generate([0, 1, 2], seed=seed)
    assert held == (sum(a.size for a in driver.device.values()), len(driver.pinned), len(driver.executables))


def test_out_of_memory_says_how_many_images_fit(load: Make, driver: Driver) -> None:
    gpu = load(images=(1, 2, 4))
    gpu.generate([0], seed=1)
    used = sum(a.size for a in driver.device.values())
    driver.memory_bytes = int(1.2 * used)
    with pytest.raises(MemoryError, match=r"4 images do not fit on Stand-in GPU .* 1 would fit: give max_batch=1"):
        gpu.generate([0, 1, 2, 3], seed=1)
    driver.memory_bytes = 2**33
    assert gpu.generate([0, 1, 2, 3], seed=1).tokens.shape == (4, 64)  # and it can go on


def test_editing_and_scoring_are_those_of_the_cpu(load: Make, tiny: Path) -> None:
    gpu, cpu = load(), Pipeline.load(tiny, device="cpu", selftest=False)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    keep = np.random.default_rng(1).random((3, 8, 8)) < 0.4
    got, wanted = (p.generate([0, 1, 2], seed=2, guidance=1.5, keep=keep, tokens=tokens) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(gpu.score(tokens, [0, 1, 2]), cpu.score(tokens, [0, 1, 2]), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({"top_k": 5}, "top-k 5, top-p 1"), ({"top_p": 0.5}, "top-k 0, top-p 0.5"), ({"greedy": True}, None)],
)
def test_what_a_plan_cannot_draw_is_refused(load: Make, settings: dict[str, Any], refused: str | None) -> None:
    """It would draw from other codes, without a word. Scores need no draw."""
    pipeline = load()
    backend = pipeline.backend
    assert isinstance(backend, GpuBackend)
    backend.engine = replace(backend.engine, sampling="plain")
    plain = {"top_k": 0, "top_p": 1.0}
    image = pipeline.generate([3], seed=1, **plain).images[0]
    if refused is None:
        pipeline.generate([3], seed=1, **settings)
        return
    wanted = (
        f"{refused}: the plan .* was built with --sampling plain, which draws from the whole codebook, or greedily; "
        "ask for that, or build the plan again with: parvis build .* --sampling topk"
    )
    with pytest.raises(RequestError, match=wanted):
        pipeline.generate([3], seed=1, **(plain | settings))
    with pytest.raises(RequestError, match=wanted):  # call by call
        pipeline.generate([3, 4], seed=1, **(plain | settings), on_preview=lambda *_: None, preview_every=1)
    with pytest.raises(RequestError, match=wanted):  # one image of two
        pipeline.generate([3, 4], seed=1, **{name: [plain[name], value] for name, value in settings.items()})
    assert (pipeline.generate([3], seed=1, **plain).images[0] == image).all()
    tokens = pipeline.generate([3], seed=1, **plain).tokens
    assert pipeline.score(tokens, [3]).shape == tokens.shape
