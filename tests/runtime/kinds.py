"""A pipeline of each kind of backend. Processes that tests start import it too, so it does without pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from par_runtime import Bundle, Pipeline
from par_runtime.backends.ort import gpu

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny"
#: What the C step can run: the widths of ``tiny`` are too small for it.
SMALL = DATA / "small"


def on_gpu_code(path: Path) -> Pipeline:
    """The backend of ONNX Runtime on a GPU, whose code also runs on the CPU's provider."""
    bundle = Bundle.open(path)
    return Pipeline(bundle, gpu.OrtCudaBackend(bundle, provider="CPUExecutionProvider", kind="cpu"))


#: name -> its bundle, and how it is loaded
KINDS: dict[str, tuple[Path, Callable[[Path], Pipeline]]] = {
    # One thread: where others use the cores, two of them wait for each other and take eight times as long.
    "C step": (SMALL, lambda path: Pipeline.load(path, device="cpu", threads=1, selftest=False)),
    "C step, threads": (SMALL, lambda path: Pipeline.load(path, device="cpu", selftest=False)),
    "ONNX Runtime": (TINY, lambda path: Pipeline.load(path, device="cpu-ort", selftest=False)),
    "ONNX Runtime, GPU": (TINY, on_gpu_code),
    "TensorRT": (TINY, lambda path: Pipeline.load(path, device="cuda:0", selftest=False)),
    "kernels": (TINY, lambda path: Pipeline.load(path, device="cuda:0", selftest=False)),
}
