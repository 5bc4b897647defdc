"""ONNX Runtime on CUDA: its code on CPU buffers here, the real thing where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from par_runtime import cli, ort_cuda
from par_runtime.bundle import Bundle, BundleError
from par_runtime.ort import OPSET24_SINCE
from par_runtime.pipeline import Pipeline
from par_runtime.request import RequestError

NEW_ENOUGH = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= OPSET24_SINCE
needs_opset_24 = pytest.mark.skipif(not NEW_ENOUGH, reason="ONNX Runtime before 1.25 does not run step.onnx")
CPU = {"provider": "CPUExecutionProvider", "kind": "cpu"}


def on_cpu_buffers(path: Path) -> Pipeline:
    bundle = Bundle.open(path)
    return Pipeline(bundle, ort_cuda.OrtCudaBackend(bundle, **CPU))


@needs_opset_24
@pytest.mark.parametrize("labels", [[2], [0, 3, 5]])
def test_tokens_and_images_are_those_of_the_cpu_backend(tiny: Path, labels: list[int]) -> None:
    settings: dict[str, Any] = {"guidance": [2.0, 1.0, 1.5][: len(labels)], "top_p": 0.9}
    device, cpu = on_cpu_buffers(tiny), Pipeline.load(tiny, device="cpu")
    device.selftest()
    for seed in (1, 2):  # the second time the caches hold the first image's keys
        got, wanted = (p.generate(labels, seed=seed, **settings) for p in (device, cpu))
        np.testing.assert_array_equal(got.tokens, wanted.tokens)
        np.testing.assert_array_equal(got.images, wanted.images)
    device.close()


@needs_opset_24
def test_the_cache_is_updated_in_place(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    device = on_cpu_buffers(tiny)
    device.backend._options.log_severity_level = 2  # type: ignore[attr-defined]
    device.backend._step = device.backend._session("step")  # type: ignore[attr-defined]
    device.generate([1], seed=1)
    assert "in-place optimization not activated" not in capfd.readouterr().err
    separate = [device.backend._value(c.numpy().copy()) for c in device.backend._caches]  # type: ignore[attr-defined]
    call = next(iter(device.backend._calls.values()))  # type: ignore[attr-defined]
    for present, value in zip(device.bundle.cache.outputs, separate, strict=True):
        call.binding.bind_ortvalue_output(present, value)
    device.backend._step.run_with_iobinding(call.binding)  # type: ignore[attr-defined]
    assert "in-place optimization not activated" in capfd.readouterr().err  # so the check above can fail


@needs_opset_24
def test_logits_and_steps_after_them(tiny: Path) -> None:
    device, cpu = on_cpu_buffers(tiny), Pipeline.load(tiny, device="cpu")
    got = {}
    for name, pipeline in (("device", device), ("cpu", cpu)):
        test = pipeline.bundle.selftest
        tokens = np.array(test["tokens"][:1], np.int64)
        from par_runtime.request import settings

        each = settings(pipeline.bundle, 1, guidance=1.5, greedy=True)
        got[name] = [pipeline.backend.logits(ids, write).copy() for _, write, ids in pipeline._calls([0], each, tokens)]
    for a, b in zip(got["device"], got["cpu"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_the_cuda_provider_it_says_what_to_install(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if ort_cuda.CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(RequestError, match=r"pip uninstall onnxruntime && pip install 'parvis\[onnxruntime-gpu\]'"):
        Pipeline.load(tiny, device="cuda-ort")
    assert cli.main(["generate", str(tiny), "--label", "0", "--device", "cuda-ort:1"]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: device 'cuda-ort' needs ONNX Runtime with CUDA")


@needs_opset_24
def test_a_silent_fallback_to_the_cpu_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime does where CUDA's libraries are missing: it loads, on the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_cuda.CUDA, "CPUExecutionProvider"])
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(BundleError, match=r"fell back to CPUExecutionProvider without an error: is there a GPU 0"):
        ort_cuda.load(Bundle.open(tiny))


@needs_opset_24
def test_heavy_operators_on_the_cpu_are_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny)
    backend = ort_cuda.OrtCudaBackend(bundle, **CPU)
    assert ort_cuda.elsewhere(backend._step, "CPUExecutionProvider") == []
    assert "Attention" in ort_cuda.elsewhere(backend._step, ort_cuda.CUDA)
    monkeypatch.setattr(ort_cuda, "elsewhere", lambda session, provider: ["Attention", "TensorScatter"])
    with pytest.raises(BundleError, match="runs Attention, TensorScatter on the CPU, which would copy the cache"):
        ort_cuda.OrtCudaBackend(bundle, **CPU)


def test_a_graph_that_cannot_be_loaded_is_named(tiny: Path, tmp_path: Path) -> None:
    if not NEW_ENOUGH:
        pytest.skip("ONNX Runtime before 1.25 does not run step.onnx")
    shutil.copytree(tiny, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    (tmp_path / "b" / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"step.onnx: onnxruntime .* cannot load it"):
        ort_cuda.OrtCudaBackend(bundle, **CPU)


@pytest.mark.gpu
def test_on_a_gpu(tiny: Path) -> None:
    if ort_cuda.CUDA not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu in place of onnxruntime")
    device, cpu = Pipeline.load(tiny, device="cuda-ort"), Pipeline.load(tiny, device="cpu")
    got, wanted = (p.generate([0, 3, 5], seed=1, guidance=1.5) for p in (device, cpu))
    assert (got.tokens == wanted.tokens).mean() > 0.9
