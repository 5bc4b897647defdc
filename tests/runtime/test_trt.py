"""The TensorRT backend on a stand-in GPU: tokens as on the CPU, and every rule of the hardware kept.

The stand-ins are in ``double/``: what runs here is all of ``backends/trt`` and
``cuda.py``; only the driver and TensorRT's runtime are not the real ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import tensorrt
from double.driver import Driver, ViolationError
from in_flight import alone, staggered

from par_runtime.backends import cuda
from par_runtime.backends.engines import ENGINE_JSON, Engine
from par_runtime.backends.trt import memory as trt_memory
from par_runtime.backends.trt import module as trt_module
from par_runtime.backends.trt.backend import Capture, TrtBackend
from par_runtime.backends.trt.memory import bind
from par_runtime.backends.trt.plan import LoadedPlan
from par_runtime.backends.trt.tables import Tables
from par_runtime.bundle import Bundle, seal
from par_runtime.cli import dispatch as cli
from par_runtime.errors import BundleError, EngineError, RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings
from par_runtime.schedule import Schedule
from par_runtime.system import sha256


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
    for pipeline in opened:
        pipeline.close()
    assert not driver.device, f"{len(driver.device)} device allocations were never freed"
    assert not driver.pinned, "pinned memory was never freed"
    assert not driver.executables, "graphs were never freed"


SETTINGS: dict[str, Any] = {"guidance": [1.5, 1.0, 3.0], "top_p": [0.9, 1.0, 1.0], "top_k": [0, 5, 20]}


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
        got[name] = [pipeline.backend.logits(schedule.batch, ids, write) for _, ids, write in schedule.walk(tokens)]
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


# -- which engine, and why not ------------------------------------------------------------------------------------------


def change(folder: Path, **fields: Any) -> None:
    """Change ``engine.json``, and seal it again."""
    entry = json.loads((folder / ENGINE_JSON).read_text()) | fields
    del entry["hash"]
    (folder / ENGINE_JSON).write_text(json.dumps(seal(entry)))


def other_gpu(folder: Path) -> None:
    change(folder, target="SM89")


def other_version(folder: Path) -> None:
    change(folder, version="0.9")


def other_bundle(folder: Path) -> None:
    change(folder, bundle="0" * 64)


def other_device(folder: Path) -> None:
    change(folder, device="NVIDIA A100-SXM4-80GB")


def truncated(folder: Path) -> None:
    plan = folder / "step.plan"
    plan.write_bytes(plan.read_bytes()[:-1])


def changed_content(folder: Path) -> None:
    plan = folder / "step.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b" ")


def unsealed(folder: Path) -> None:
    text = (folder / ENGINE_JSON).read_text()
    (folder / ENGINE_JSON).write_text(text.replace('"fp32"', '"fp16"'))


def no_json(folder: Path) -> None:
    (folder / ENGINE_JSON).unlink()


def newer_schema(folder: Path) -> None:
    change(folder, schema=2)


def escaping_file(folder: Path) -> None:
    entry = json.loads((folder / ENGINE_JSON).read_text())
    entry["plans"]["step"]["file"] = "../../step.onnx"
    change(folder, plans=entry["plans"])


REFUSALS = [
    (other_gpu, r"was built for SM89, this GPU \(Stand-in GPU\) is SM80; build with: parvis build .* --target SM80"),
    (other_version, r"was built by tensorrt_rtx 0.9, installed is tensorrt_rtx 1.0.double; rebuild with: parvis build"),
    (other_bundle, r"was built from a bundle with hash 000000000000, this one is .*; rebuild with: parvis build"),
    (other_device, r"was tuned on NVIDIA A100-SXM4-80GB, this GPU is Stand-in GPU; rebuild with"),
    (truncated, r"step.plan: truncated: \d+ bytes, expected \d+; rebuild with: parvis build .* --target SM80"),
    (changed_content, r"step.plan: its content was changed .*; rebuild with"),
    (unsealed, r"engine.json: its content does not match its own hash"),
    (no_json, r"engine.json: cannot be read .*; build it again with: parvis build"),
    (newer_schema, r"engine.json: schema 2, this parvis reads 1"),
    (escaping_file, r"engine.json: incomplete .*is not one of the engine's own"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSALS, ids=[f.__name__ for f, _ in REFUSALS])
def test_an_engine_that_does_not_fit_is_refused(
    driver: Driver, tmp_path: Path, tiny: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    spoil(tensorrt.write_engine(Bundle.open(path)))
    with pytest.raises(EngineError, match=message):
        Pipeline.load(path, device="cuda")
    assert not driver.device


def test_a_damaged_engine_leaves_the_place_to_the_next_best(driver: Driver, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    good = tensorrt.write_engine(Bundle.open(path))
    better = good.with_name(good.name + "-tuned")
    shutil.copytree(good, better)
    change(better, tuned={"chosen": True, "capture": "call"})
    with Pipeline.load(path, device="auto") as pipeline:
        assert isinstance(pipeline.backend, TrtBackend)
        assert pipeline.backend.engine.path == better
    truncated(better)
    with Pipeline.load(path, device="auto") as pipeline:
        assert isinstance(pipeline.backend, TrtBackend)
        assert pipeline.backend.engine.path == good
        assert pipeline.note == ""


def test_a_failed_self_test_frees_the_gpu(
    driver: Driver, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    tensorrt.write_engine(Bundle.open(path))
    monkeypatch.setattr(TrtBackend, "step", lambda self, batch, ids, write, uniform: np.zeros_like(ids[:1]))
    monkeypatch.setattr(
        TrtBackend, "logits", lambda self, batch, ids, write: np.zeros((1, ids.shape[1], 64), np.float32)
    )
    with pytest.raises(BundleError, match="self-test failed on"):
        Pipeline.load(path, device="cuda")
    assert not driver.device


def test_a_plan_that_is_garbage_is_refused(driver: Driver, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    folder = tensorrt.write_engine(Bundle.open(path))
    (folder / "step.plan").write_bytes(b"\x00garbage")
    entry = json.loads((folder / ENGINE_JSON).read_text())
    entry["plans"]["step"] |= {"bytes": 8, "sha256": sha256(folder / "step.plan")}
    change(folder, plans=entry["plans"])
    with pytest.raises(EngineError, match=r"step.plan: tensorrt_rtx .* cannot load it \(.*magic tag.*\); rebuild with"):
        Pipeline.load(path, device="cuda")


def test_auto_takes_a_fitting_engine_else_the_cpu_with_the_reason(driver: Driver, tmp_path: Path, tiny: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    pipeline = Pipeline.load(path, selftest=False)
    assert pipeline.backend.info.name.startswith("onnxruntime-cpu")
    assert f"holds no engines; build them with: parvis build {path} --target local" in pipeline.note
    folder = tensorrt.write_engine(Bundle.open(path))
    pipeline = Pipeline.load(path, selftest=False)
    assert pipeline.backend.info.name == "tensorrt_rtx 1.0.double fp32 on Stand-in GPU"
    assert pipeline.note == ""
    pipeline.close()
    driver.devices = 0
    pipeline = Pipeline.load(path, selftest=False)
    assert pipeline.note == "running on the CPU: the driver shows no GPU (CUDA_VISIBLE_DEVICES?)"
    driver.devices = 1
    other_gpu(folder)
    pipeline = Pipeline.load(path, selftest=False)
    assert "was built for SM89" in pipeline.note
    change(folder, target="SM80")
    truncated(folder)
    pipeline = Pipeline.load(path, selftest=False)
    assert "running on the CPU: " in pipeline.note
    assert "step.plan: truncated" in pipeline.note
    with pytest.raises(EngineError, match="there is no GPU 3, only 1"):
        Pipeline.load(path, device="cuda:3")


def test_the_command_line_says_why_it_is_the_cpu(
    driver: Driver, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    arguments = ["generate", str(path), "--label", "0", "--seed", "1", "--out", str(tmp_path / "x.png")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""  # no engine and nothing asked for: nothing to explain
    other_version(tensorrt.write_engine(Bundle.open(path)))
    assert cli.main(arguments) == 0
    assert "parvis: running on the CPU: " in capsys.readouterr().err
    assert cli.main([*arguments, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: device 'cuda' cannot run")


# -- planted bugs: each is one that was made, or nearly made ------------------------------------------------------------


def wrong_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoadedPlan.context
    monkeypatch.setattr(LoadedPlan, "context", lambda self, profile, *rest: real(self, max(profile - 1, 0), *rest))


def swapped_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of one layer bound to each other's buffers, in and out alike, at the second call."""
    real = TrtBackend._run

    def run(self: TrtBackend, at: Any, launch: Any, index: int, ids: int) -> None:
        if index == 1:
            k, v = (self._memory.caches[f"past_{kind}.0"].pointer for kind in "kv")
            for name in ("past", "present"):
                bind(self.engine, at.contexts[launch.plan], f"{name}_k.0", v)
                bind(self.engine, at.contexts[launch.plan], f"{name}_v.0", k)
        real(self, at, launch, index, ids)

    monkeypatch.setattr(TrtBackend, "_run", run)


def write_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.fill_launch

    def fill(self: Tables, block: Any, index: int, launch: Any) -> None:
        real(self, block, index, launch)
        if launch.call.phase.name == "group":
            self.view(block, "write", index, launch.query)[...] += 1

    monkeypatch.setattr(Tables, "fill_launch", fill)


def missing_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt.Engine, "get_aliased_input_tensor", lambda self, name: None)


def no_wait_before_the_copy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrtBackend.make_images

    def make_images(self: TrtBackend, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if any(held.warm for held in self._memory._buffers.values()):
                inner.setattr(cuda.Stream, "synchronize", lambda self: None)
            return real(self, *arguments)

    monkeypatch.setattr(TrtBackend, "make_images", make_images)


def staging_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next image's inputs written while the upload of this one still waits."""
    real = TrtBackend._captured

    def captured(self: TrtBackend, at: Any, decode: bool) -> Any:
        graphs = real(self, at, decode)
        for graph in graphs:
            graph.launch(self.stream)
        at.staging.array[:] = 0
        return []

    monkeypatch.setattr(TrtBackend, "_captured", captured)


def separate_present_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trt_memory.bind

    given: dict[str, int] = {}

    def other(engine: Any, context: Any, name: str, address: int) -> None:
        given[name] = address
        real(engine, context, name, given["past_k.0"] if name == "present_v.0" else address)

    monkeypatch.setattr(trt_memory, "bind", other)


def length_counts_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.fill_launch

    def fill(self: Tables, block: Any, index: int, launch: Any) -> None:
        real(self, block, index, launch)
        self.view(block, "length", index, launch.query)[...] = launch.call.write + launch.query

    monkeypatch.setattr(Tables, "fill_launch", fill)


def capture_without_a_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrtBackend, "_warm", lambda self, at: None)


def sync_inside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrtBackend._enqueue

    def enqueue(self: TrtBackend, at: Any, index: int) -> None:
        real(self, at, index)
        self.stream.synchronize()

    monkeypatch.setattr(TrtBackend, "_enqueue", enqueue)


def unzeroed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Buffer, "zero", lambda self, stream: stream.fill(self.pointer, 0xFF, self.size))


def copy_of_the_wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transition takes the last initial token from the slot behind it."""
    real = cuda.Stream.copy_2d

    def copy(self: Any, dst: int, dst_pitch: int, src: int, src_pitch: int, width: int, height: int) -> None:
        real(self, dst, dst_pitch, src + (8 if width == 8 and height > 4 else 0), src_pitch, width, height)

    monkeypatch.setattr(cuda.Stream, "copy_2d", copy)


BUGS = [
    wrong_profile,
    swapped_caches,
    write_off_by_one,
    missing_alias,
    no_wait_before_the_copy_is_read,
    staging_reused_too_early,
    separate_present_buffer,
    length_counts_padding,
    capture_without_a_first_run,
    sync_inside_the_loop,
    unzeroed_cache,
    copy_of_the_wrong_slot,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(load: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    wanted = [
        Pipeline.load(tiny, device="cpu", selftest=False).generate([0, 3, 5], seed=s, **SETTINGS).tokens for s in (1, 2)
    ]

    def differs() -> bool:
        gpu = load()
        got = [gpu.generate([0, 3, 5], seed=s, **SETTINGS).tokens for s in (1, 2)]
        captured_whole = gpu.backend.capturing == "image"  # type: ignore[attr-defined]
        return not captured_whole or any((a != b).any() for a, b in zip(got, wanted, strict=True))

    assert not differs(), "the code as it is must pass"
    bug(monkeypatch)
    try:
        caught = differs()
    except (ViolationError, EngineError) as error:
        print(f"caught: {error}")
        caught = True
    assert caught, f"{bug.__name__} went unnoticed"


def test_editing_and_scoring_are_those_of_the_cpu(load: Make, tiny: Path) -> None:
    gpu, cpu = load(), Pipeline.load(tiny, device="cpu", selftest=False)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 64))
    keep = np.random.default_rng(1).random((3, 8, 8)) < 0.4
    got, wanted = (p.generate([0, 1, 2], seed=2, guidance=1.5, keep=keep, tokens=tokens) for p in (gpu, cpu))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(gpu.score(tokens, [0, 1, 2]), cpu.score(tokens, [0, 1, 2]), atol=1e-4)
