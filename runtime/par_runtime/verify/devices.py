"""The two sides of a comparison: the bundle on the devices that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from par_runtime.bundle import Bundle, FileCheck
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from par_runtime.backends.trt.backend import Capture

OPSET23 = "cpu-opset23"  #: a device beside those of ``Pipeline.load``: ONNX Runtime on the bundle's other step graph


def load(path: Path, device: str, threads: int | None, verify: FileCheck, capture: Capture = "image") -> Pipeline:
    """The bundle on ``device``: one that ``Pipeline.load`` takes, or :data:`OPSET23`. Errors as there.

    The self-test is not run, because the comparison is a stricter one.
    """
    if device != OPSET23:
        return Pipeline.load(path, device, threads=threads, selftest=False, verify=verify, capture=capture)
    if threads is not None and threads < 1:
        raise RequestError(f"threads {threads}: expected 1 or more")
    from par_runtime.backends.ort.cpu import OrtBackend  # here: comparing two GPUs' backends does not need it

    bundle = Bundle.open(path, verify)
    return Pipeline(bundle, OrtBackend(bundle, threads, "step_opset23"))


def default_reference(candidate: Pipeline) -> str:
    """The device of the reference where none is named: ONNX Runtime on the CPU.

    Where the candidate is exactly that, :data:`OPSET23`: another step graph, so that two implementations are compared.
    """
    info = candidate.backend.info
    return OPSET23 if info.runtime == "onnxruntime-cpu" and "opset23" not in info.version else "cpu-ort"
