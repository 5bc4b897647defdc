"""Sessions of ONNX Runtime on a CPU, and its errors as errors of Python. For the step, the decoder and the encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import BYTES
from par_runtime.errors import BundleError
from par_runtime.system import available_cores

#: The first release with every operator of opset 24 that ``step.onnx`` uses; before, ``step_opset23.onnx`` runs.
OPSET24_SINCE = (1, 25)
#: How ONNX Runtime's allocators report that memory is missing (the last one: CUDA's).
NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory")


def version() -> tuple[int, ...]:
    """(1, 32) for ONNX Runtime 1.32.0."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options of a session with ``threads`` of the CPU; default: all cores that this process may use."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 2
    return options


def open_session(bundle: Bundle, name: str, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session of the bundle's graph ``name`` on the CPU. Raises BundleError."""
    graph = bundle.graphs.get(name)
    if graph is None:
        raise BundleError(
            f"{bundle.path}: has no graph {name!r}, which onnxruntime {ort.__version__} needs; export the bundle again"
        )
    path = bundle.path / graph.file
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({reason}); export the bundle again"
        ) from error


def weight_bytes(bundle: Bundle) -> float:
    """Bytes of one weight as a call reads it: half precision is widened to fp32 when the session is made."""
    stored = BYTES.get(bundle.precision, 4.0)
    return stored if stored < 2 else 4.0


def run(
    session: ort.InferenceSession,
    name: str,
    values: NDArray[Any],
    explain: Callable[[Exception], Exception] | None = None,
) -> NDArray[Any]:
    """The only output of a decoder or encoder for its only input ``name``.

    ``explain`` (default: :func:`explained`) turns an error of ONNX Runtime's into the one that is raised.
    """
    try:
        out: NDArray[Any] = session.run(None, {name: np.ascontiguousarray(values)})[0]
    except Exception as error:
        raise (explain or explained)(error) from error
    return out


def explained(error: Exception) -> Exception:
    """``error`` of ONNX Runtime as MemoryError where memory is missing; else as it is."""
    text = str(error)
    return MemoryError(text) if any(words in text for words in NO_MEMORY) else error
