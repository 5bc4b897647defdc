"""TensorRT's plans on a real GPU: ``make test-gpu`` (see ``docs/gpu.md``).

Builds plans for this machine's GPU, runs the whole of the runtime on them, and prints a report for an issue. The
same properties are tested on a stand-in in ``tests/runtime/backends/test_trt.py``. Our own kernels are not tried here:
``make gpu-report`` does that.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GPU_REPORT
from par_runtime.backends import cuda

pytestmark = pytest.mark.gpu
#: The bundle that is tested; give your own for figures of your own model.
BUNDLE = Path(os.environ.get("PARVIS_GPU_BUNDLE", Path(__file__).parent.parent / "models" / "demo"))
REPEATS = int(os.environ.get("PARVIS_GPU_REPEATS", "10"))  #: timed batches each
STRESS = int(os.environ.get("PARVIS_GPU_STRESS", "50"))  #: batches of 4 images
CAPTURES = ("image", "call", "none")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Iterator[cuda.Device]:
    """The first GPU; without one every test here is skipped with the reason."""
    if cuda.device_count() == 0:
        pytest.skip(f"no GPU: {cuda.why_no_device()}")
    with cuda.Device.open(0) as device:
        GPU_REPORT.append(
            f"{device.name}, SM{device.capability[0]}{device.capability[1]}, {device.total_bytes / 1e9:.0f} GB, "
            f"driver API {device.driver_version}"
        )
        yield device


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of a bundle with an engine for this GPU, built once per combination."""
    from par_export.engines.build import build
    from par_export.engines.request import BuildRequest

    made: dict[tuple[Any, ...], Path] = {}
    folder = tmp_path_factory.mktemp("engines")

    def engine(source: Path, precision: str, mode: str = "shared", images: tuple[int, ...] = (1, 2, 4)) -> Path:
        key = (source, precision, mode, images)
        if key not in made:
            path = folder / f"{source.name}-{precision}-{mode}-{len(made)}"
            shutil.copytree(source, path, ignore=shutil.ignore_patterns("engines"))
            started = time.perf_counter()
            out = build(
                BuildRequest(path, "local", precision, images, mode, cache_folder=folder / "cache"), lambda _: None
            )
            GPU_REPORT.append(f"built {out.name} of {source.name} in {time.perf_counter() - started:.1f} s")
            made[key] = path
        return made[key]

    return engine


def load(path: Path, **options: Any) -> Any:
    from par_runtime import Pipeline

    return Pipeline.load(path, device="cuda", **options)


@pytest.mark.parametrize("mode", ["shared", "per-phase"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_verify_passes(
    engines: Callable[..., Path], capsys: pytest.CaptureFixture[str], precision: str, mode: str
) -> None:
    """Logits per phase, tokens with shared noise, images: within the floors of the precision."""
    from par_runtime.cli import dispatch as cli

    path = engines(BUNDLE, precision, mode)
    code = cli.main(["verify", str(path), "--device", "cuda", "--against", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    GPU_REPORT.append(f"verify {precision} {mode}: exit code {code}; {json.dumps(found)[:1500]}")
    assert code == 0


@pytest.mark.parametrize("source", ["n1", "fp32", "n16"])
def test_every_group_size(engines: Callable[..., Path], bundles: dict[str, Path], source: str) -> None:
    from par_runtime import Pipeline

    pipeline = load(engines(bundles[source], "fp16"))
    got = pipeline.generate([1, 4, 0], seed=3, guidance=1.7)
    pipeline.close()
    wanted = Pipeline.load(bundles[source], device="cpu").generate([1, 4, 0], seed=3, guidance=1.7)
    same = float((got.tokens[:, :4] == wanted.tokens[:, :4]).mean())  # later ones follow from a first near-tie
    GPU_REPORT.append(f"{source}: {same:.3f} of the first tokens are those of the CPU")
    assert same > 0.7


def test_every_way_of_launching_gives_the_same(engines: Callable[..., Path]) -> None:
    path = engines(BUNDLE, "fp16")
    made = {}
    for capture in CAPTURES:
        pipeline = load(path, capture=capture)
        for labels in ([3], [0, 1, 2]):
            made[capture, len(labels)] = pipeline.generate(labels, seed=5, guidance=1.5)
        GPU_REPORT.append(f"capture {capture}: in use {pipeline.backend.capturing}")
        assert pipeline.backend.capturing == capture, "the driver refused this way of launching"
        pipeline.close()
    for (_, count), result in made.items():
        np.testing.assert_array_equal(result.tokens, made["image", count].tokens)
        np.testing.assert_array_equal(result.images, made["image", count].images)


def test_calls_one_by_one_give_the_same_as_a_whole_image(engines: Callable[..., Path]) -> None:
    pipeline = load(engines(BUNDLE, "fp16"))
    whole = pipeline.generate([5], seed=2, guidance=1.5)
    shown: list[np.ndarray] = []
    stepped = pipeline.generate([5], seed=2, guidance=1.5, preview_every=16, on_preview=lambda i, d, t: shown.append(i))
    np.testing.assert_array_equal(whole.tokens, stepped.tokens)
    assert len(shown) == pipeline.bundle.calls // 16
    pipeline.close()


def test_an_image_depends_on_its_seed_alone(engines: Callable[..., Path]) -> None:
    """Not on its batch, nor on its place there. TensorRT has other kernels for other batch sizes, which round on their
    own: so of those the first tokens are compared, and how many are the same.
    """
    pipeline = load(engines(BUNDLE, "fp16"))
    labels, seeds = [0, 1, 2, 3], [7, 8, 9, 10]
    many = pipeline.generate(labels, seeds=seeds, guidance=1.5)
    again = pipeline.generate(labels, seeds=seeds, guidance=1.5)
    np.testing.assert_array_equal(many.tokens, again.tokens)

    def alone(seeds: list[int]) -> np.ndarray:
        made = [pipeline.generate([label], seed=seed, guidance=1.5) for label, seed in zip(labels, seeds, strict=True)]
        return np.concatenate([result.tokens for result in made])

    turned = pipeline.generate(labels[::-1], seeds=seeds[::-1], guidance=1.5).tokens[::-1]
    same = [float((tokens[:, :4] == many.tokens[:, :4]).mean()) for tokens in (turned, alone(seeds))]
    GPU_REPORT.append(f"{same[0]:.3f} of the first tokens are the same in another place, {same[1]:.3f} alone")
    assert min(same) > 0.7
    for tokens in (pipeline.generate(labels, seeds=[11, 12, 13, 14], guidance=1.5).tokens, alone([11, 12, 13, 14])):
        assert (tokens != many.tokens).any(1).all()
    pipeline.close()


def test_throughput(engines: Callable[..., Path]) -> None:
    """No figure is asserted; rows go into the report."""
    path = engines(BUNDLE, "fp16", "shared", (1, 2, 4, 8))
    for capture in CAPTURES:
        pipeline = load(path, capture=capture)
        for size in (1, 4, 8):
            labels = [i % pipeline.bundle.n_classes for i in range(size)]
            samples = []
            for repeat in range(REPEATS + 1):
                started = time.perf_counter()
                pipeline.generate(labels, seed=repeat, guidance=1.5)
                samples.append(1e3 * (time.perf_counter() - started) / size)
            middle, low, high = statistics.median(samples[1:]), min(samples[1:]), max(samples[1:])
            GPU_REPORT.append(
                f"{pipeline.bundle.name} capture {capture}, {size} images: median {middle:.2f} ms per image "
                f"({low:.2f} to {high:.2f}, {REPEATS} runs)"
            )
        pipeline.close()


def test_the_benchmarks_rows(engines: Callable[..., Path], gpu: cuda.Device) -> None:
    """Phases by events on the device, against the measured bandwidth; no figure is asserted, rows go into the
    report.
    """
    from par_runtime.bench import gpu as bench_gpu
    from par_runtime.bench.bounds import with_bounds
    from par_runtime.bench.limits import Limits
    from par_runtime.bench.measure import Setting, measure
    from par_runtime.bench.report.text import table
    from par_runtime.bench.subjects.pipeline import PipelineSubject

    here = bench_gpu.describe(0)
    subject = PipelineSubject.load(engines(BUNDLE, "fp16"), "parvis", device="cuda")
    limits = Limits(((bench_gpu.COPY_BYTES, bench_gpu.copy_gb_s(0)),), None, "copies on the device")
    rows = with_bounds(
        measure([subject], Setting("phases", repetitions=REPEATS, gpu=here)), {"parvis": subject.info}, {0: limits}
    )
    subject.close()
    by = {row.phase: row for row in rows}
    assert {phase.name: phase.repeat for phase in subject.info.architecture.phases} == {
        name: by[name].calls for name in ("prefill", "sequential", "transition", "group") if name in by
    }
    assert all(sample > 0 for row in rows for sample in row.samples_ms)
    assert by["image"].clock == "CUDA events"
    GPU_REPORT.append(table(rows))


def test_stress_of_200_images_with_constant_memory(engines: Callable[..., Path], gpu: cuda.Device) -> None:
    pipeline = load(engines(BUNDLE, "fp16"))
    pipeline.generate([0, 1, 2, 3], seed=0)
    gpu.activate()
    before = gpu.free_bytes()
    for turn in range(STRESS):
        pipeline.generate([turn % pipeline.bundle.n_classes, 1, 2, 3], seed=turn)
    gpu.activate()
    after = gpu.free_bytes()
    GPU_REPORT.append(f"{4 * STRESS} images: {before / 1e6:.0f} MB free before, {after / 1e6:.0f} MB after")
    assert before - after < 16e6
    pipeline.close()


def test_a_named_target_runs_here(engines: Callable[..., Path], gpu: cuda.Device, tmp_path: Path) -> None:
    """What was built for a target by name, as on a machine without a GPU, runs on a GPU of that name."""
    from par_export.engines.build import build
    from par_export.engines.request import BuildRequest

    pytest.importorskip("tensorrt_rtx", reason="only TensorRT-RTX builds for a named target")
    path = tmp_path / "demo"
    shutil.copytree(BUNDLE, path, ignore=shutil.ignore_patterns("engines"))
    target = f"SM{gpu.capability[0]}{gpu.capability[1]}"
    build(BuildRequest(path, target, "fp16", (1,), use_cache=False), lambda _: None)
    pipeline = load(path)  # the self-test compares tokens with those of the export
    started = time.perf_counter()
    again = load(path)
    GPU_REPORT.append(f"second load with the runtime cache: {time.perf_counter() - started:.1f} s")
    for each in (pipeline, again):
        each.close()


def test_tuning_keeps_an_engine(tmp_path: Path) -> None:
    from par_export.engines import tune
    from par_export.engines.request import BuildRequest

    path = tmp_path / "demo"
    shutil.copytree(BUNDLE, path, ignore=shutil.ignore_patterns("engines"))
    request = BuildRequest(path, "local", images=(1,), cache_folder=tmp_path / "cache")
    tune.tune(request, repeats=REPEATS, rounds=2, say=GPU_REPORT.append)
    pipeline = load(path)
    assert pipeline.generate([0], seed=1).images is not None
    pipeline.close()
