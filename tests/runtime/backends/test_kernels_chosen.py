"""Which engine of a bundle is taken on which GPU, of kernels or of TensorRT, and how commands show it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from double import bare, kernels, tensorrt
from double.driver import Driver
from double.hand_made import hand_made

from par_runtime.backends import choose
from par_runtime.backends.engines import ENGINE_JSON, KERNELS, Engine, why_unfit
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.program import VERSION
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.errors import CudaError, EngineError


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny, tmp_path / "bundle"))


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
    kernels.edited(folder, lambda entry: entry.update(version="0.9"))
    with pytest.raises(EngineError, match=r"is of version 0.9 of kernels, this parvis runs 1; rebuild with"):
        choose.choose(bundle, "cuda")


def test_shared_memory_of_a_later_gpu_may_not_suffice(driver: Driver, bundle: Bundle) -> None:
    """A block may have 163 KiB on SM80 and SM87, 99 on SM86 and SM89."""
    folder = kernels.write_engine(bundle, hand_made(bundle), target="SM80")
    name = next(iter(json.loads((folder / ENGINE_JSON).read_text())["kernels"]["kernels"]))
    for size, capability, fits in ((99, (8, 9), True), (100, (8, 9), False), (163, (8, 0), True), (163, (8, 7), True)):
        kernels.edited(folder, lambda e, size=size: e["kernels"]["kernels"][name].update(shared=size * 1024))
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
    kernels.edited(plans, lambda e: e.update(tuned=for_tuned | {"rows": [{"images": 1, "ms_per_image": 12.5}]}))
    assert taken()[0] == "tensorrt_rtx"
    rows = [{"images": 1, "ms_per_image": 12.25}, {"images": 2, "ms_per_image": 30}]
    kernels.edited(ours, lambda e: e.update(tuned=for_tuned | {"rows": rows}))
    assert taken()[0] == "kernels"
    kernels.edited(
        ours, lambda e: e.update(tuned=for_tuned | {"rows": [*rows[1:], {"images": 1, "ms_per_image": 12.75}]})
    )
    assert taken()[0] == "tensorrt_rtx"
    kernels.edited(ours, lambda e: e.update(tuned=for_tuned | {"rows": [{"images": 1, "ms_per_image": "fast"}]}))
    with pytest.raises(EngineError, match=r"tuned.rows\[0\].ms_per_image is 'fast'; expected a number"):
        Engine.open(ours, bundle)
    kernels.edited(ours, lambda e: e.update(tuned={}))
    kernels.edited(plans, lambda e: e.update(tuned={}))
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
