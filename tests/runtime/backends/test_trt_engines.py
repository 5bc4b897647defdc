"""Which engine of a bundle a GPU takes, and why not: on the stand-in GPU of ``double/``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from double import tensorrt
from double.driver import Driver

from par_runtime.backends.engines import ENGINE_JSON
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.bundle import Bundle, seal
from par_runtime.cli import dispatch as cli
from par_runtime.errors import BundleError, EngineError
from par_runtime.pipeline import Pipeline
from par_runtime.system import sha256


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
    (no_json, r"engine.json: missing; build it again with: parvis build \S+ --target local$"),
    (newer_schema, r"engine.json: schema 2, this parvis reads 1"),
    (escaping_file, r"engine.json: file '../../step.onnx' is not one of the engine's own"),
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
        assert isinstance(pipeline.backend, GpuBackend)
        assert pipeline.backend.engine.path == better
    truncated(better)
    with Pipeline.load(path, device="auto") as pipeline:
        assert isinstance(pipeline.backend, GpuBackend)
        assert pipeline.backend.engine.path == good
        assert pipeline.note == ""


def test_a_failed_self_test_frees_the_gpu(
    driver: Driver, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(tiny, path)
    tensorrt.write_engine(Bundle.open(path))
    monkeypatch.setattr(GpuBackend, "step", lambda self, batch, ids, write, uniform: np.zeros_like(ids[:1]))
    monkeypatch.setattr(
        GpuBackend, "logits", lambda self, batch, ids, write: np.zeros((1, ids.shape[1], 64), np.float32)
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
    assert "parvis: running on the CPU (--device cpu silences this): " in capsys.readouterr().err
    assert cli.main([*arguments, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: device 'cuda' cannot run")
