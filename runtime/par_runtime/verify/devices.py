"""Loading the two sides of a comparison: one bundle on two devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from par_runtime.arguments import cpu_threads
from par_runtime.bundle import Bundle, FileCheck
from par_runtime.late import importing
from par_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from par_runtime.backends.engines import Capture

#: A device that only ``verify`` knows: ONNX Runtime on the CPU, with the step graph of opset 23.
OPSET23 = "cpu-opset23"


def load(
    path: Path,
    device: str,
    threads: int | None,
    verify: FileCheck,
    capture: Capture = "image",
    arithmetic: str = "fp32",
    cache: str = "fp32",
    decoder_precision: str = "fp32",
) -> Pipeline:
    """The bundle on ``device``, which is one that ``Pipeline.load`` takes, or :data:`OPSET23`.

    A reference computes in fp32, also where the bundle's calibration has proven another precision.

    Raises what ``Pipeline.load`` raises. The self-test is not run, because the comparison is a stricter one.
    """
    if device != OPSET23:
        return Pipeline.load(
            path,
            device,
            threads=threads,
            selftest=False,
            verify=verify,
            capture=capture,
            arithmetic=arithmetic,
            cache=cache,
            decoder_precision=decoder_precision,
        )
    threads = cpu_threads(threads)
    with importing("par_runtime.backends.ort.cpu"):  # here: comparing two GPUs' backends does not need it
        from par_runtime.backends.ort.cpu import OrtBackend
    bundle = Bundle.open(path, verify)
    return Pipeline(bundle, OrtBackend(bundle, threads, "step_opset23"))


def default_reference(candidate: Pipeline) -> str:
    """The device of the reference, where the command names none: ONNX Runtime on the CPU.

    If the candidate itself is that, :data:`OPSET23`, so that two different graphs are compared.
    """
    info = candidate.backend.info
    return OPSET23 if info.runtime == "onnxruntime-cpu" and "opset23" not in info.version else "cpu-ort"
