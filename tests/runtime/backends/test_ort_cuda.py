"""ONNX Runtime on CUDA: its code on CPU buffers here, the real thing where there is one."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from par_runtime.backends import cuda
from par_runtime.backends.ort import gpu as ort_cuda
from par_runtime.backends.ort.cpu import OPSET24_SINCE
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.errors import BundleError, CudaError, RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule

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
        # The CPU's own decoder, in C, rounds some numbers to the next grey level.
        assert np.abs(got.images.astype(int) - wanted.images.astype(int)).max() <= 1
    device.close()


@needs_opset_24
def test_the_cache_is_updated_in_place(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    device = on_cpu_buffers(tiny)
    device.backend._options.log_severity_level = 2  # type: ignore[attr-defined]
    device.backend._step = device.backend._session("step")  # type: ignore[attr-defined]
    device.generate([1], seed=1)
    assert "in-place optimization not activated" not in capfd.readouterr().err
    separate = [device.backend._value(c.numpy().copy()) for c in device.backend._caches]  # type: ignore[attr-defined]
    call = next(iter(device.backend._bound.values()))  # type: ignore[attr-defined]
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
        each = image_settings(pipeline.bundle, 1, guidance=1.5, greedy=True)
        schedule = Schedule.of(pipeline.bundle, [0], each)
        got[name] = [pipeline.backend.logits(batch, ids, write) for _, batch, ids, write in schedule.walk(tokens)]
    for a, b in zip(got["device"], got["cpu"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_without_the_cuda_provider_it_says_what_to_install(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if ort_cuda.CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(
        RequestError, match=r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>="
    ):
        Pipeline.load(tiny, device="cuda-ort")
    assert cli.main(["generate", str(tiny), "--label", "0", "--device", "cuda-ort:1"]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: device 'cuda-ort' needs ONNX Runtime with CUDA")


def test_without_any_onnxruntime_it_says_what_to_install(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from par_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", str(tiny), "--label", "0", "--device", "cuda-ort"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "needs onnxruntime-gpu, which is not installed; pip install 'onnxruntime-gpu>=" in done.stderr


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """onnxruntime-gpu without a GPU, as ONNX Runtime behaves: it raises, or says nothing and takes the CPU."""
    real = ort.InferenceSession

    def make(raised: Exception | None) -> None:
        def session(path: str, options: Any, providers: Any, **others: Any) -> Any:
            assert providers[0] == (ort_cuda.CUDA, {"device_id": "0", "use_tf32": "0"})
            if raised is not None:
                raise raised
            return real(path, options, providers=["CPUExecutionProvider"], **others)

        monkeypatch.setattr(ort, "InferenceSession", session)

    monkeypatch.setattr(ort, "get_available_providers", lambda: [ort_cuda.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(cuda, "has_driver", lambda: True)
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: print("Failed to load libcudart.so.13"), raising=False)
    return make


def test_releases_that_leave_work_on_the_cpu_are_refused(
    tiny: Path, pretended: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.23.2", "1.26.0"):
        monkeypatch.setattr(ort, "__version__", version)
        with pytest.raises(RequestError, match=rf"needs onnxruntime-gpu 1\.27 or newer .* installed is {version}"):
            ort_cuda.OrtCudaBackend(Bundle.open(tiny))


@needs_opset_24
def test_without_a_driver_no_libraries_are_advised(
    tiny: Path, pretended: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_driver", lambda: False)
    with pytest.raises(
        RequestError, match=r"^device 'cuda-ort': no NVIDIA driver .*; device 'cpu' runs without a GPU$"
    ):
        ort_cuda.OrtCudaBackend(Bundle.open(tiny))


@needs_opset_24
def test_a_silent_fallback_to_the_cpu_is_an_error(
    tiny: Path, pretended: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """As ONNX Runtime does where CUDA's libraries are missing: it loads, on the CPU."""
    pretended(None)
    with pytest.raises(
        BundleError, match=r"fell back to CPUExecutionProvider: .*libonnxruntime_providers_cuda.* needs"
    ):
        ort_cuda.OrtCudaBackend(Bundle.open(tiny))
    assert capfd.readouterr() == ("", "")


@needs_opset_24
@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            'a.cc:63 FAIL : Parse Failed to parse provider option "device_id": b.cc:71 operator() Invalid device ID: '
            "1, must be between 0 (inclusive) and 1 (exclusive).\n",
            RequestError,
            r"device 'cuda-ort:0' cannot be used: Invalid device ID: 1, must be between .*; "
            r"give one that nvidia-smi lists$",
        ),
        (
            "a.cc:63 FAIL : CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=vm ; file=b.cc",
            RequestError,
            r"cannot be used: CUDA failure 100: no CUDA-capable device is detected; give one",
        ),
        (
            "a.cc:360 void* AllocateRawInternal() Failed to allocate memory for requested buffer of size 256\n",
            MemoryError,
            "^Failed to allocate memory for requested buffer of size 256$",
        ),
        (
            "Protobuf parsing failed.",
            BundleError,
            r"step.onnx: onnxruntime .* cannot load it \(Protobuf parsing failed",
        ),
    ],
)
def test_what_keeps_it_from_the_gpu_is_told_in_one_line(
    tiny: Path, pretended: Callable[..., None], said: str, kind: type[Exception], told: str
) -> None:
    pretended(RuntimeError(said))  # texts of onnxruntime-gpu 1.31.1
    with pytest.raises(kind, match=told) as caught:
        ort_cuda.OrtCudaBackend(Bundle.open(tiny))
    assert "\n" not in str(caught.value)


@needs_opset_24
def test_a_failure_on_the_gpu_does_not_continue_on_the_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own session prints such a failure, takes the CPU and says nothing more."""
    pipeline = on_cpu_buffers(tiny)
    tokens = pipeline.generate([1], seed=1).tokens
    backend: Any = pipeline.backend
    for session in (backend._step, backend._decoder):
        assert not session._enable_fallback

    class Fails:
        def run(self, *_: object) -> None:
            raise RuntimeError(
                "EP_FAIL : while running Conv : CUDA failure 700: an illegal address ; GPU=0 ; hostname=vm"
            )

        run_with_iobinding = run

    monkeypatch.setattr(backend, "_step", Fails())
    monkeypatch.setattr(backend, "_decoder", Fails())
    for work in (lambda: pipeline.generate([1], seed=1), lambda: pipeline.decode(tokens)):
        with pytest.raises(CudaError, match=r"onnxruntime .* failed: CUDA failure 700: an illegal address$"):
            work()


@needs_opset_24
def test_too_little_memory_for_the_buffers_is_a_memory_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = on_cpu_buffers(tiny)

    def full(*_: object) -> None:
        raise RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 40000000")

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", full)
    with pytest.raises(MemoryError, match=r"^Failed to allocate memory for requested buffer of size 40000000$"):
        pipeline.generate([1], seed=1)


@needs_opset_24
def test_operators_on_the_cpu_are_an_error_but_for_shapes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny)
    backend = ort_cuda.OrtCudaBackend(bundle, **CPU)
    assert ort_cuda.not_on_provider(backend._step, "CPUExecutionProvider") == []
    others = ort_cuda.not_on_provider(backend._step, ort_cuda.CUDA)
    assert {"Attention", "TensorScatter", "Transpose", "Reshape"} <= set(others)
    assert "Concat" not in others  # of shapes
    monkeypatch.setattr(ort_cuda, "not_on_provider", lambda session, provider: ["Attention", "Transpose"])
    with pytest.raises(
        BundleError, match="runs Attention, Transpose on the CPU, which would copy in every call: install"
    ):
        ort_cuda.OrtCudaBackend(bundle, **CPU)
    with pytest.warns(UserWarning, match="decoder.onnx: .* runs Attention, Transpose on the CPU; decoding copies"):
        backend.decode(np.zeros((1, bundle.n_tokens), np.int64))  # once an image: slower, and no more


def test_libraries_in_another_folder_of_the_path_are_loaded_too(
    tiny: Path, tmp_path: Path, pretended: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pip install --target``, or an environment on top of one with PyTorch: ONNX Runtime looks beside itself."""
    beside = Path(ort.__file__).resolve().parents[1]
    for name in ("cu13/lib", "cudnn/lib", "nothing"):
        (tmp_path / "nvidia" / name).mkdir(parents=True)
    loaded: list[dict[str, object]] = []
    pretended(None)
    monkeypatch.setattr(ort, "preload_dlls", lambda **how: loaded.append(how))
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "nvidia")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(beside)])
    importlib.invalidate_caches()
    with ort_cuda._quiet(ort_cuda.CUDA):
        pass
    folders = [str(tmp_path / "nvidia" / name) for name in ("cu13/lib", "cudnn/lib")]
    assert loaded == [{}, *({"msvc": False, "directory": folder} for folder in folders)]


def test_a_bundle_without_the_graph_is_refused(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    graphs = {name: graph for name, graph in bundle.graphs.items() if name != "step"}
    with pytest.raises((BundleError, RequestError), match=r"has no graph 'step'|or newer"):
        ort_cuda.OrtCudaBackend(replace(bundle, graphs=graphs), **CPU)
    with pytest.raises((BundleError, RequestError), match=r"cache of dtype 'float16'.*needs float32|or newer"):
        ort_cuda.OrtCudaBackend(replace(bundle, cache=replace(bundle.cache, dtype="float16")), **CPU)


def test_a_graph_that_cannot_be_loaded_is_named(tiny: Path, tmp_path: Path) -> None:
    if not NEW_ENOUGH:
        pytest.skip("ONNX Runtime before 1.25 does not run step.onnx")
    shutil.copytree(tiny, tmp_path / "b")
    (tmp_path / "b" / "step.onnx").write_bytes(b"no graph")
    bundle = Bundle.open(tmp_path / "b", "none")
    with pytest.raises(BundleError, match=r"step.onnx: onnxruntime .* cannot load it"):
        ort_cuda.OrtCudaBackend(bundle, **CPU)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default:.*InstanceNormalization on the CPU")  # of opset 22 and newer, in ONNX Runtime 1.31
def test_on_a_gpu(tiny: Path) -> None:
    if ort_cuda.CUDA not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu in place of onnxruntime")
    device, cpu = Pipeline.load(tiny, device="cuda-ort"), Pipeline.load(tiny, device="cpu")
    got, wanted = (p.generate([0, 3, 5], seed=1, guidance=1.5) for p in (device, cpu))
    assert (got.tokens == wanted.tokens).mean() > 0.9
