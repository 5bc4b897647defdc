"""Pipelines on each kind of backend, for the tests of what happens around them: threads, forks, close, moved files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from par_runtime import Bundle, Pipeline
from par_runtime.backends.native import library
from par_runtime.backends.ort import gpu

#: The bundle that the C step can run: the widths of ``tests/data/tiny`` are too small for it.
DEMO = Path(__file__).parents[2] / "models" / "demo"
TINY = Path(__file__).parents[1] / "data" / "tiny"


def on_gpu_code(path: Path) -> Pipeline:
    """The backend of ONNX Runtime on a GPU, whose code also runs on the CPU's provider."""
    bundle = Bundle.open(path)
    return Pipeline(bundle, gpu.OrtCudaBackend(bundle, provider="CPUExecutionProvider", kind="cpu"))


#: name -> its bundle, and how it is loaded
KINDS: dict[str, tuple[Path, Callable[[Path], Pipeline]]] = {
    # One thread: where others use the cores, two of them wait for each other and take eight times as long.
    "C step": (DEMO, lambda path: Pipeline.load(path, device="cpu", threads=1, selftest=False)),
    "C step, threads": (DEMO, lambda path: Pipeline.load(path, device="cpu", selftest=False)),
    "ONNX Runtime": (TINY, lambda path: Pipeline.load(path, device="cpu-ort", selftest=False)),
    "ONNX Runtime, GPU": (TINY, on_gpu_code),
    "TensorRT": (TINY, lambda path: Pipeline.load(path, device="cuda:0", selftest=False)),
    "kernels": (TINY, lambda path: Pipeline.load(path, device="cuda:0", selftest=False)),
}
ON_A_CPU = ["C step", "ONNX Runtime"]
no_kernels = pytest.mark.skipif(library.library() is None, reason="no compiler at installation, or an older CPU")


def params(*names: str) -> list[object]:
    """The kinds of these names, for ``parametrize``; the C step only where it was built."""
    return [pytest.param(name, marks=[no_kernels] if name.startswith("C step") else []) for name in names]


@pytest.fixture(scope="module")
def shared_pipelines() -> Iterator[Callable[[str], Pipeline]]:
    """One open pipeline for each kind, for all tests of a module."""
    opened: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in opened:
            path, load = KINDS[name]
            opened[name] = load(path)
        return opened[name]

    yield get
    for pipeline in opened.values():
        pipeline.close()
