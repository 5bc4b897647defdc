"""Engines of kernels are loaded on the stand-in GPU: weights, modules, prepared launches, and what is refused.

Their kernels are real ones, in programs that compute nothing of use: what is tested is how they are run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import bare, kernels, tensorrt
from double.driver import Driver, ViolationError
from double.hand_made import BK, BN, hand_made
from double.twins import Twins

from par_export.cli import build as build_cli
from par_export.kernels.spec import Planned
from par_runtime.backends import choose, cuda
from par_runtime.backends.engines import ENGINE_JSON, KERNELS, Engine, why_unfit
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels import backend as kernels_backend
from par_runtime.backends.native import decoding
from par_runtime.backends.program import VERSION
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle, Calibration, seal
from par_runtime.cli import dispatch as cli
from par_runtime.cli.inputs import load_pipeline
from par_runtime.dtypes import AUTO
from par_runtime.errors import BundleError, CudaError, EngineError, OutOfMemory, RequestError
from par_runtime.pipeline import Pipeline


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny, tmp_path / "bundle"))


Load = Callable[..., GpuBackend]


@pytest.fixture
def load(driver: Driver, bundle: Bundle) -> Load:
    def make(plan: Planned | None = None, target: str = "SM80", **how: Any) -> GpuBackend:
        driver.twin = Twins(driver)
        folder = kernels.write_engine(bundle, plan or hand_made(bundle), target=target)
        bare.register(driver, folder)
        return kernels_backend.load(bundle, Engine.open(folder, bundle), cuda.Device.open(0), **how)

    return make


def packed(matrix: np.ndarray) -> np.ndarray:
    k, n = matrix.shape
    padded = np.zeros((-(-k // BK) * BK, -(-n // BN) * BN), np.float32)
    padded[:k, :n] = matrix
    return padded.reshape(padded.shape[0] // BK, BK, -1, BN).transpose(2, 0, 3, 1)


@pytest.mark.parametrize("block", [2**25, 1000])
def test_weights_are_packed_and_nothing_else_stays(
    load: Load, driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Also through blocks that are much smaller than a tensor, and filled by several threads."""
    monkeypatch.setattr("par_runtime.backends.kernels.upload.BLOCK_BYTES", block)
    monkeypatch.setattr("par_runtime.backends.kernels.upload.PIECE_BYTES", 300)
    seen: list[tuple[int, int]] = []
    plan = hand_made(bundle)
    backend = load(plan, on_load=lambda done, total: seen.append((done, total)))
    shared = backend.programs["step"].shared  # type: ignore[attr-defined]
    raw = (bundle.path / "weights.data").read_bytes()
    for name, weight in plan.weights.items():
        got = driver.span(shared.addresses[name], weight.bytes, name)
        if weight.stored is None:
            wanted = plan.constants[name]
        else:
            wanted = raw[weight.stored.offset : weight.stored.offset + weight.stored.length]
            if weight.pack is not None:
                wanted = packed(np.frombuffer(wanted, np.float16).reshape(weight.stored.shape)).tobytes()
        assert got.tobytes() == wanted, name
    read = sum(w.bytes if w.stored is None else w.stored.length for w in plan.weights.values())
    assert seen[-1] == (read, read)
    assert seen == sorted(set(seen))
    assert len(driver.device) == 2  # all weights, and the counters
    assert not driver.pinned
    assert (driver.span(shared.states["step"], 2048, "counters") == 0).all()
    backend.close()
    backend.close()
    assert not driver.device
    assert not driver.modules


@pytest.mark.parametrize(("target", "dependent"), [("SM80", False), ("SM90", True)])
def test_launches_in_order_with_the_addresses_of_now(
    load: Load, driver: Driver, bundle: Bundle, target: str, dependent: bool
) -> None:
    driver.capability = (int(target[2]), int(target[3]))
    backend = load(hand_made(bundle, dependent=dependent), target)
    driver.launches.clear()
    stream = backend.stream
    program = backend.programs["step"]
    with backend.device.allocate(program.scratch_bytes(1), "scratch") as scratch:
        context = program.context(1, scratch.pointer, scratch.size, stream)
        with pytest.raises(EngineError, match=r"step call: no address for past_k.0, past_k.1; please report"):
            context.enqueue(stream, "step call")
        with backend.device.allocate(4096, "keys") as keys, backend.device.allocate(4096, "others") as others:
            for buffer in (keys, others):
                buffer.zero(stream)
                for i in range(2):
                    context.bind(f"past_k.{i}", buffer.pointer + 1024 * i)
                context.enqueue(stream, "step call")  # the arguments of the first are copied, so they may change now
            stream.synchronize()
            one = np.zeros((BN, BK), np.float32)
            one[:8, :8] = 1
            for buffer in (keys, others):
                got = driver.span(buffer.pointer, 4096, "keys").view(np.float32).reshape(4, BN, BK)
                np.testing.assert_array_equal(got, [one, one, one * 0, one * 0])
            out = driver.span(scratch.pointer + 256, 1024, "scratch").view(np.float32).reshape(BN, BK)
            np.testing.assert_array_equal(out, one)
            with pytest.raises(EngineError, match=r"address 0x[0-9a-f]+ of 'past_k.0'; expected a multiple of 16"):
                context.bind("past_k.0", keys.pointer + 8)
            with pytest.raises(EngineError, match=r"no tensor 'past_q.0'"):
                context.bind("past_q.0", keys.pointer)
    assert [waits for _, waits in driver.launches] == ([False] + 5 * [dependent]) * 2
    assert {name for name, _ in driver.launches} == {"pack.panels"}
    backend.close()


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``engine.json`` and seal it again."""
    entry = json.loads((folder / ENGINE_JSON).read_text())
    del entry["hash"]
    change(entry)
    (folder / ENGINE_JSON).write_text(json.dumps(seal(entry)))


def unknown_tensor(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["2"]["layer"][0][2][1][0] = "past_v.{i}x"


def layer_too_many(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["layers"] = 3


def beyond_scratch(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0][2][1][1] = 4096


def crooked(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0][2][1][1] = 8


def beyond_weights(e: dict[str, Any]) -> None:
    stored = e["kernels"]["weights"]["table"]["stored"]
    stored["offset"] = 2**30


def beyond_constants(e: dict[str, Any]) -> None:
    e["kernels"]["weights"]["ones"]["offset"] = 256


def phase_missing(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["phases"].remove("group")


def profile_missing(e: dict[str, Any]) -> None:
    del e["kernels"]["programs"]["step"]["profiles"]["2"]


def two_of_a_name(e: dict[str, Any]) -> None:
    e["kernels"]["programs"]["step"]["profiles"]["1"]["scratch"]["ids"] = [0, 16]


def plans_too(e: dict[str, Any]) -> None:
    e["plans"] = {"step": {"file": "x", "bytes": 1, "sha256": "0" * 64, "query": 4, "phases": []}}


def no_kernels(e: dict[str, Any]) -> None:
    del e["kernels"]


def pack_of_a_constant(e: dict[str, Any]) -> None:
    e["kernels"]["weights"]["ones"]["pack"] = e["kernels"]["programs"]["step"]["profiles"]["1"]["after"][0]


def pack_from_elsewhere(e: dict[str, Any]) -> None:
    weight = next(w for w in e["kernels"]["weights"].values() if w["pack"])
    weight["pack"][2][0][0] = "table"


REFUSED = [
    (unknown_tensor, r"programs.step.profiles.2: panels-\w+ takes 'past_v.0x', which is no tensor, weight or buffer"),
    (layer_too_many, r"takes 'past_k.2', which is no tensor"),
    (beyond_scratch, r"takes byte 4096 of 'out.a'; expected a multiple of 16 below 4096"),
    (crooked, r"takes byte 8 of 'out.a'; expected a multiple of 16"),
    (beyond_weights, r"kernels.weights.table is \d+ bytes at 1073741824 of weights.data, which has 159568"),
    (beyond_constants, r"kernels.weights.ones is 128 bytes at 256 of constants.data, which has 128"),
    (phase_missing, r"no program serves the phase 'group'; expected one with a query of 4 positions"),
    (profile_missing, r"kernels.programs.step.profiles are \[1\]; expected \[1, 2\]"),
    (two_of_a_name, r"a tensor, a weight, scratch and state have different names"),
    (plans_too, r"plans is .*; expected none, and no decoder, in an engine of kernels"),
    (no_kernels, r"runtime is 'kernels'; expected kernels where there is an entry kernels"),
    (pack_of_a_constant, r"kernels.weights.ones.pack is .*; expected null"),
    (pack_from_elsewhere, r"takes 'table', which is no tensor, weight or buffer"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[f.__name__ for f, _ in REFUSED])
def test_lists_that_cannot_be_run_are_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = kernels.write_engine(bundle, hand_made(bundle))
    Engine.open(folder, bundle)
    edited(folder, change)
    with pytest.raises(EngineError, match=message) as error:
        Engine.open(folder, bundle)
    assert f"parvis build {bundle.path}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kernels-1-sm80-fp16", "--engine kernels --target SM80 --precision fp16"),
        ("tensorrt_rtx-1.7.1.116-sm89-bf16-per-phase", "--target SM89 --precision bf16 --engines per-phase"),
        ("tensorrt-10.15.0-sm90-fp16-tune-norm-after", "--target local --precision fp16"),
        ("other", "--target local"),
    ],
)
def test_the_command_that_builds_an_unreadable_engine_again(
    tiny: Path, tmp_path: Path, name: str, options: str
) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "my 'first' bundle"))
    (path / "engines" / name).mkdir(parents=True)
    (path / "engines" / name / ENGINE_JSON).write_text("{}")
    with pytest.raises(EngineError) as error:
        Engine.open(path / "engines" / name, Bundle.open(path))
    command = shlex.split(str(error.value).partition("build it again with: ")[2])
    assert command == ["parvis", "build", str(path), *options.split()]
    build_cli.parser().parse_args(command[2:])  # it has all that the command needs


@pytest.mark.parametrize("name", ["constants.data", "cubin"])
@pytest.mark.parametrize("verify", ["auto", "none"])
def test_damaged_files_are_refused_whatever_is_checked(driver: Driver, bundle: Bundle, name: str, verify: Any) -> None:
    folder = kernels.write_engine(bundle, hand_made(bundle))
    bare.register(driver, folder)
    file = next(f for f in folder.iterdir() if f.name.endswith(name))
    file.write_bytes(b"!" + file.read_bytes()[1:])
    with pytest.raises(
        EngineError,
        match=rf"{file.name}: its content was changed.*; rebuild with: parvis build .* "
        "--engine kernels --target SM80 --precision fp32 --max-images 2",
    ):
        Pipeline.load(bundle.path, "cuda", verify=verify, selftest=False)
    assert not driver.device
    assert not driver.modules


def test_weights_that_do_not_fit(load: Load, driver: Driver) -> None:
    driver.memory_bytes = 50_000
    with pytest.raises(
        OutOfMemory,
        match=r"its weights need 0 MB of GPU memory and 0 MB more while they are loaded, of 0 MB on Stand-in GPU 0 MB "
        "are free: not even one image fits",
    ):
        load()
    assert not driver.device


def test_a_kernel_that_reads_out_of_bounds_is_caught(load: Load, driver: Driver, bundle: Bundle) -> None:
    plan = hand_made(bundle)
    name = next(name for name, weight in plan.weights.items() if weight.pack)
    pack = plan.weights[name].pack
    assert pack is not None
    plan.weights[name] = replace(plan.weights[name], pack=replace(pack, grid=(pack.grid[0] * 512, *pack.grid[1:])))
    with pytest.raises(ViolationError, match=r"pack.panels writes number \d+ of packed, which has \d+"):
        load(plan)


def test_what_the_driver_refuses_names_the_kernel(load: Load, driver: Driver, bundle: Bundle) -> None:
    with pytest.raises(
        CudaError,
        match=r"cuModuleLoadData of pack.panels \(panels-\w+.cubin\) failed: "
        "CUDA_ERROR_NO_BINARY_FOR_GPU.*the engine holds no kernels for this GPU",
    ):
        load(target="SM86")
    assert not driver.device


def test_which_gpus_an_engine_fits(driver: Driver, bundle: Bundle) -> None:
    """Below SM90 an engine runs on later GPUs of its generation; from there on only where it was built for."""
    for target in ("SM80", "SM86", "SM90"):
        folder = kernels.write_engine(bundle, hand_made(bundle), target=target)
        bare.register(driver, folder)
    for capability, wanted in (((8, 0), "SM80"), ((8, 6), "SM86"), ((8, 9), "SM86"), ((9, 0), "SM90")):
        driver.capability = capability
        backend, note = choose.choose(bundle, "auto")
        assert isinstance(backend, GpuBackend)
        assert (backend.engine.target, note) == (wanted, "")
        assert backend.info.name == "kernels 1 fp32 on Stand-in GPU"
        backend.close()
    driver.capability = (12, 0)
    with pytest.raises(
        EngineError,
        match=r"was built for SM80, this GPU \(Stand-in GPU\) is SM120; build with: parvis "
        r"build .* --engine kernels --target SM120 --precision fp32",
    ):
        choose.choose(bundle, "cuda")
    edited(folder, lambda entry: entry.update(version="0.9"))
    with pytest.raises(EngineError, match=r"is of version 0.9 of kernels, this parvis runs 1; rebuild with"):
        choose.choose(bundle, "cuda")


def test_shared_memory_of_a_later_gpu_may_not_suffice(driver: Driver, bundle: Bundle) -> None:
    """A block may have 163 KiB on SM80 and SM87, 99 on SM86 and SM89."""
    folder = kernels.write_engine(bundle, hand_made(bundle), target="SM80")
    name = next(iter(json.loads((folder / ENGINE_JSON).read_text())["kernels"]["kernels"]))
    for size, capability, fits in ((99, (8, 9), True), (100, (8, 9), False), (163, (8, 0), True), (163, (8, 7), True)):
        edited(folder, lambda e, size=size: e["kernels"]["kernels"][name].update(shared=size * 1024))
        engine = Engine.open(folder, bundle)
        why = why_unfit(engine, KERNELS, VERSION, capability, "Some GPU")
        assert (why is None) == fits
        if why:
            assert "SM80 and takes 102400 bytes of shared memory, this GPU (Some GPU) has 101376; build with" in why
            assert "--engine kernels --target SM89" in why


def test_a_fresh_interpreter_loads_it_with_the_driver_alone(bundle: Bundle) -> None:
    kernels.write_engine(bundle, hand_made(bundle))
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "torch", "onnxruntime", "onnx", "tensorrt", "tensorrt_rtx"):
            raise ModuleNotFoundError(name + " is not here", name=name)
sys.meta_path.insert(0, Missing())
import json
from pathlib import Path
from par_runtime import Pipeline, RequestError
from par_runtime.backends import cuda
from double.bare import driver_for
cuda.driver = driver_for(Path({str(bundle.path)!r}))
with Pipeline.load({str(bundle.path)!r}, "cuda", selftest=False) as pipeline:
    print(pipeline.backend.info.name)
assert not cuda.driver.device
cuda.driver.capability = (7, 5)
try:
    Pipeline.load({str(bundle.path)!r})
except RequestError as error:
    print(error)
"""
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, why = done.stdout.splitlines()
    assert name == "kernels 1 fp32 on Stand-in GPU"
    build = f"parvis build {re.escape(str(bundle.path))} --target SM75 --precision fp32"  # not of kernels
    wanted = (
        rf"no engine runs here \(.* was built for SM80, .* is SM75; build with: {build}\); running on the CPU needs onn"
    )
    assert re.match(wanted, why), why  # why the GPU is not used is not lost


def test_the_fastest_engine_is_taken(
    driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours before TensorRT's; what was measured before what was not; of two that were, the faster; none that is
    damaged."""

    def taken() -> tuple[str, str]:
        backend, note = choose.choose(bundle, "auto")
        backend.close()
        return backend.info.runtime, note

    ours = kernels.write_engine(bundle, hand_made(bundle))
    bare.register(driver, ours)
    imported: list[str] = []
    load_tensorrt = trt_module.load
    monkeypatch.setattr(trt_module, "load", lambda name: (imported.append(name), load_tensorrt(name))[1])
    assert taken() == ("kernels", "")
    assert not imported  # nothing of TensorRT is needed
    plans = tensorrt.write_engine(bundle, images=(1, 2, 4))
    assert taken() == ("kernels", "")
    for_tuned = {"chosen": True, "capture": "image", "images": 1}
    edited(plans, lambda e: e.update(tuned=for_tuned | {"rows": [{"images": 1, "ms_per_image": 12.5}]}))
    assert taken()[0] == "tensorrt_rtx"
    rows = [{"images": 1, "ms_per_image": 12.25}, {"images": 2, "ms_per_image": 30}]
    edited(ours, lambda e: e.update(tuned=for_tuned | {"rows": rows}))
    assert taken()[0] == "kernels"
    edited(ours, lambda e: e.update(tuned=for_tuned | {"rows": [*rows[1:], {"images": 1, "ms_per_image": 12.75}]}))
    assert taken()[0] == "tensorrt_rtx"
    edited(ours, lambda e: e.update(tuned=for_tuned | {"rows": [{"images": 1, "ms_per_image": "fast"}]}))
    with pytest.raises(EngineError, match=r"tuned.rows\[0\].ms_per_image is 'fast'; expected a number"):
        Engine.open(ours, bundle)
    edited(ours, lambda e: e.update(tuned={}))
    edited(plans, lambda e: e.update(tuned={}))
    next(ours.glob("*.cubin")).write_bytes(b"")
    assert taken() == ("tensorrt_rtx", "")
    next(plans.glob("*.plan")).write_bytes(b"")
    runtime, note = taken()
    assert runtime in ("onnxruntime-cpu", "native-cpu")
    assert ".cubin: truncated: 0 bytes" in note
    assert "step.plan: truncated" in note or "decoder.plan: truncated" in note


def test_an_engine_that_the_driver_refuses_leaves_the_place_to_the_next(
    driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.write_engine(bundle, hand_made(bundle))  # the driver is not told of its cubins, so they are none to it
    plans = tensorrt.write_engine(bundle)
    backend, note = choose.choose(bundle, "auto")
    assert (backend.info.runtime, note) == ("tensorrt_rtx", "")
    backend.close()
    (plans / "step.plan").unlink()
    with pytest.raises(CudaError, match=r"cuModuleLoadData of .* failed: CUDA_ERROR_INVALID_IMAGE"):
        choose.choose(bundle, "cuda")
    backend, note = choose.choose(bundle, "auto")
    assert backend.info.device == "cpu"
    assert note.startswith("running on the CPU: cuModuleLoadData of ")
    assert not driver.device


def test_an_engine_whose_tokens_are_no_codes_is_refused(
    driver: Driver, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))  # it writes no tokens
    with pytest.raises(
        BundleError, match=r"self-test failed on kernels 1 .* gives token -\d+ at position 0, at export it"
    ):
        Pipeline.load(bundle.path, "cuda")
    with Pipeline.load(bundle.path, "cuda", selftest=False) as pipeline:
        for how in ({}, {"preview_every": 1, "on_preview": lambda *_: None}):
            with pytest.raises(
                EngineError, match=r"kernels 1 .* gives token -\d+ at position 0; expected 0\.\.63: it com"
            ):
                pipeline.generate(0, seed=1, **how)
    command = ["generate", str(bundle.path), "--label", "0", "--device", "cuda", "--out", str(tmp_path / "x.png")]
    assert cli.main(command) == cli.main([*command, "--no-selftest"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("parvis: error: ") == 2


def test_commands_show_it(driver: Driver, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kernels.write_engine(bundle, hand_made(bundle))
    assert cli.main(["inspect", str(bundle.path)]) == 0
    assert re.search(
        rf"engine    {folder.name}: SM80, fp32, shared, batches of 1, 2, [0-9.]+ kB", capsys.readouterr().out
    )
    assert cli.main(["inspect", str(bundle.path), "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    files = sum(file.stat().st_size for file in folder.iterdir() if file.name != ENGINE_JSON)
    assert (engine["runtime"], engine["bytes"]) == ("kernels", files)
    for capability, wanted in (((8, 0), "runs  kernels "), ((7, 5), "no    kernels ")):
        driver.capability = capability
        assert cli.main(["doctor"]) == 0
        assert wanted in capsys.readouterr().out


def test_a_bar_is_shown_while_weights_are_loaded(
    driver: Driver, bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = argparse.Namespace(
        bundle=bundle.path, device="cuda", threads=None, capture="none", quiet=False, **AUTO._asdict()
    )
    load_pipeline(arguments, bundle, selftest=False).close()
    assert "weights:" in capsys.readouterr().err
    arguments.quiet = True
    load_pipeline(arguments, bundle, selftest=False).close()
    assert capsys.readouterr().err == ""
    with pytest.raises(RequestError, match="on_load 'yes': expected a function"):
        Pipeline.load(bundle.path, "cuda", on_load="yes")  # type: ignore[arg-type]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline.load(bundle.path, "cuda", on_load=stop)
    assert not driver.device
    assert not driver.pinned


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_what_decodes_clips_beside_it_has_the_precision_that_was_asked_for(
    driver: Driver, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    bare.register(driver, kernels.write_engine(bundle, hand_made(bundle)))
    opens: list[Any] = []
    monkeypatch.setattr(kernels_backend, "load", lambda *given: opens.append(given[-1]) or "a backend")
    monkeypatch.setattr(decoding, "open_decoder", lambda files, threads=None, precision="fp32": precision)
    for asked, proven, wanted in (
        ("auto", "fp32", "fp32"), ("auto", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("fp32", "bf16", "fp32"),
    ):  # fmt: skip
        calibrated = replace(bundle, calibration=Calibration("kept", 0, (), "fp32", "fp32", "", {}, proven))
        assert choose.choose(calibrated, device, decoder_precision=asked)[0] == "a backend"
        assert opens.pop()(None) == wanted


def test_a_weights_file_that_is_written_while_it_is_read(load: Load, driver: Driver, bundle: Bundle) -> None:
    def write(done: int, total: int) -> None:
        with (bundle.path / "weights.data").open("r+b") as file:
            file.write(b"changed!")

    with pytest.raises(BundleError, match=r"weights.data: was overwritten after it was loaded; load the bundle again"):
        load(on_load=write)
    assert not driver.device


def test_a_weights_file_that_was_replaced_before(load: Load, driver: Driver, bundle: Bundle) -> None:
    """The manifest is of the old one; a file that is cut is noticed where its size was not looked at."""
    file = bundle.path / "weights.data"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(BundleError, match=r"weights.data: was replaced after its manifest was read"):
        load()
    bundle.checked.clear()
    with pytest.raises(BundleError, match=r"weights.data: ends before byte \d+; copy the bundle again"):
        kernels_backend.load(bundle, Engine.open(next(bundle.path.glob("engines/*"))), cuda.Device.open(0))
    assert not driver.device
    assert not driver.pinned
