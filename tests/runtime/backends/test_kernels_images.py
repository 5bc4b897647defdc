"""Engines of our own kernels on the stand-in GPU: tokens and images as on the CPU, and every rule of the hardware kept.

What runs here is all of ``backends/kernels``, ``backends/gpu`` and ``cuda.py``, and the kernels' own source; not the
real ones are the driver, and what compiles the source.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from double.driver import Driver
from double.fixtures import SETTINGS, Make
from in_flight import alone, staggered

from par_runtime.backends.engines import Capture
from par_runtime.cli import dispatch as cli
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule


def on_cpu(path: Path) -> Pipeline:
    return Pipeline.load(path, device="cpu", selftest=False)


def same_images(one: np.ndarray, other: np.ndarray) -> None:
    """One grey level apart at most: sums are made in another order."""
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("target", "capture"),
    [
        pytest.param("SM90", "image", marks=pytest.mark.slow),
        ("SM80", "call"),
        pytest.param("SM90", "none", marks=pytest.mark.slow),
    ],
)
def test_tokens_and_images_are_those_of_the_cpu(
    load_kernels: Make, tiny: Path, driver: Driver, target: str, capture: Capture
) -> None:
    gpu, cpu = load_kernels(capture=capture, target=target), on_cpu(tiny)
    wanted = [
        (labels, settings, cpu.generate(labels, seed=11, **settings))
        for labels, settings in (([2], {"guidance": 2.0}), ([0, 3, 5], SETTINGS))
    ]
    for _ in range(2 if capture == "image" else 1):  # the second time everything is captured and warm
        for labels, settings, result in wanted:
            got = gpu.generate(labels, seed=11, **settings)
            np.testing.assert_array_equal(got.tokens, result.tokens)
            same_images(got.images, result.images)
    assert gpu.backend.capturing == capture  # type: ignore[attr-defined]
    if capture == "image":
        assert driver.counts.get("launch", 0) == 4  # an image is one launch
        # One for each batch size, kept; the first was captured again when the larger one had moved the caches.
        assert driver.counts["instantiate"] == 3
    # The step's kernels want one division of the processors into shared memory and cache, the decoder's have no wish.
    step = {source for source, _ in driver.launches if source.startswith(("step.", "attention.", "draw."))}
    assert driver.carveouts == dict.fromkeys(step, 100)
    assert len(step) > 5
    early = {waits for _, waits in driver.launches}
    assert early == ({True, False} if target == "SM90" else {False})


@pytest.mark.parametrize("own", [False, True])
def test_blocks_of_many_rows(load_kernels: Make, tiny: Path, own: bool) -> None:
    """In all products, two panels and two groups of rows, of which some are none; or, of eight images of "tiny", where
    the planner takes them.

    An image that is alone is made in other blocks, of the same panels.
    """
    source, count = (tiny, 8) if own else (tiny.parent / "small", 3)
    gpu, cpu = load_kernels(source, images=(1, count), many=not own), on_cpu(source)
    labels = [i % 6 for i in range(count)]
    got, wanted = (p.generate(labels, seed=3, guidance=1.7, top_p=0.9, decode=False) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    alone = gpu.generate(labels[-1:], seed=2 + count, guidance=1.7, top_p=0.9, decode=False)
    np.testing.assert_array_equal(alone.tokens[0], got.tokens[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n1", "n16"])
def test_other_group_sizes(load_kernels: Make, bundles: dict[str, Path], name: str) -> None:
    gpu, cpu = load_kernels(bundles[name], images=(2,)), on_cpu(bundles[name])
    got, wanted = (p.generate([4, 0], seed=3, guidance=1.7, top_p=0.9) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)


def test_one_synchronisation_per_image(load_kernels: Make, driver: Driver) -> None:
    gpu = load_kernels()
    gpu.generate([0], seed=1)
    before = driver.counts["synchronize"]
    gpu.generate([0], seed=2)
    assert driver.counts["synchronize"] == before + 1


def test_the_self_test_and_single_calls(load_kernels: Make, tiny: Path) -> None:
    gpu, cpu = load_kernels(selftest=True), on_cpu(tiny)
    shown: dict[str, list[np.ndarray]] = {"gpu": [], "cpu": []}
    results = {}
    for name, pipeline in (("gpu", gpu), ("cpu", cpu)):
        results[name] = pipeline.generate(
            [1, 2],
            seed=5,
            guidance=2.0,
            preview_every=8,
            on_preview=lambda i, d, t, name=name: shown[name].append(i),
        )
    np.testing.assert_array_equal(results["gpu"].tokens, results["cpu"].tokens)
    same_images(np.stack(shown["gpu"]), np.stack(shown["cpu"]))
    same_images(gpu.decode(results["cpu"].tokens), results["cpu"].images)


def test_logits_are_those_of_the_cpu(load_kernels: Make, tiny: Path) -> None:
    gpu, cpu = load_kernels(), on_cpu(tiny)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    got = {}
    for name, pipeline in (("gpu", gpu), ("cpu", cpu)):
        schedule = Schedule.of(pipeline.bundle, [0, 1, 2], [Settings(guidance=1.5)] * 3)
        got[name] = [pipeline.backend.logits(batch, ids, write) for _, batch, ids, write in schedule.walk(tokens)]
    for a, b in zip(got["gpu"], got["cpu"], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_at_different_steps_give_the_tokens_of_images_made_alone(load_kernels: Make, tiny: Path) -> None:
    """With profiles of 1, 2 and 4 images the caches move to larger ones while images are in flight."""
    gpu = load_kernels()
    wanted = alone(Pipeline.load(tiny, device="cpu-ort", selftest=False))
    assert (staggered(gpu) == wanted).all()
    assert (alone(gpu) == wanted).all()


def test_batches_beyond_the_engine_are_split(load_kernels: Make, tiny: Path) -> None:
    gpu, cpu = load_kernels(images=(1, 2)), on_cpu(tiny)
    labels = [0, 1, 2]
    got, wanted = (p.generate(labels, seed=9, decode=False) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    with pytest.raises(RequestError, match="max_batch 3: expected 1 to 2 on kernels"):
        gpu.generate(labels, max_batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_within_the_floors_of_verify(
    load_kernels: Make, capsys: pytest.CaptureFixture[str], driver: Driver, precision: str
) -> None:
    gpu = load_kernels(images=(1, 2), precision=precision, decoder="fp16")
    one, again = (gpu.generate([0, 1], seed=4, decode=False).tokens for _ in range(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one[1:2], gpu.generate([1], seed=5, decode=False).tokens)  # whatever the batch
    gpu.close()
    driver.twin.parts = None  # type: ignore[union-attr]
    assert cli.main(["verify", str(gpu.bundle.path), "--images", "1", "--groups", "3", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["candidate"]["backend"].startswith(f"kernels 1 {precision} on")
    assert max(phase["max_error"] for phase in row["logits"]) > 0  # it is another precision


@pytest.mark.slow
def test_memory_stays_constant_over_many_images(load_kernels: Make, driver: Driver) -> None:
    gpu = load_kernels(images=(1,))
    gpu.generate([0], seed=0)
    held = sum(a.size for a in driver.device.values()), len(driver.pinned), len(driver.executables)
    for seed in range(3):
        gpu.generate([0], seed=seed)
    assert held == (sum(a.size for a in driver.device.values()), len(driver.pinned), len(driver.executables))


def test_out_of_memory_says_how_many_images_fit(load_kernels: Make, driver: Driver) -> None:
    gpu = load_kernels(images=(1, 2, 4))
    gpu.generate([0], seed=1, decode=False)
    used = sum(a.size for a in driver.device.values())
    driver.memory_bytes = int(1.05 * used)
    with pytest.raises(MemoryError, match=r"4 images do not fit on Stand-in GPU .* 1 would fit: give max_batch=1"):
        gpu.generate([0, 1, 2, 3], seed=1)
    driver.memory_bytes = 2**33
    assert gpu.generate([0, 1, 2, 3], seed=1, decode=False).tokens.shape == (4, 64)  # and it can go on


def test_editing_and_scoring_are_those_of_the_cpu(load_kernels: Make, tiny: Path) -> None:
    gpu, cpu = load_kernels(), on_cpu(tiny)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    keep = np.random.default_rng(1).random((3, 8, 8)) < 0.4
    got, wanted = (p.generate([0, 1, 2], seed=2, guidance=1.5, keep=keep, tokens=tokens) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(gpu.score(tokens, [0, 1, 2]), cpu.score(tokens, [0, 1, 2]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_computes_here_agrees_with_tritons_interpreter(load_kernels: Make, driver: Driver, precision: str) -> None:
    """Every kernel of an engine, in calls of one and of n positions, and in the decoder."""
    gpu = load_kernels(images=(1,), precision=precision, decoder="fp16", capture="none", compare=True)
    schedule = Schedule.of(gpu.bundle, [1], [Settings(guidance=1.5, top_k=20, top_p=0.9)], [3])
    tokens = np.zeros((1, gpu.bundle.n_tokens), np.int64)
    for index, (call, batch, ids, write) in enumerate(schedule.walk(tokens)):
        driver.twin.compare = index in (1, 5)  # type: ignore[union-attr]
        tokens[:, call.positions] = gpu.backend.step(batch, ids, write, schedule.noise[:, call.positions])
        if index == 5:
            break
    gpu.decode(tokens)
    kernels = gpu.backend.engine.kernels  # type: ignore[attr-defined]
    compared = driver.twin.compared  # type: ignore[union-attr]
    assert set(compared) == {kernel.source for kernel in kernels.kernels.values()}
