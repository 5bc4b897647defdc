"""Lines of the report: what a stage emits for it, and what it says of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from par_export.errors import BuildError
from par_runtime.bench.rows import median, spread
from par_runtime.bench.subjects.base import OutOfTimeError
from par_runtime.errors import BundleError, CudaError, EngineError, RequestError, TensorRTMissingError

#: Errors that are said in one line. Any other is a fault of ours: it is printed whole, and the report goes on.
EXPECTED = (
    BuildError,
    BundleError,
    CudaError,
    EngineError,
    MemoryError,
    OSError,
    OutOfTimeError,
    RequestError,
    TensorRTMissingError,
)
CALL = "call"  #: in a line of shapes, in place of a kernel: all kernels of a call, one after the other
#: Takes a line of a stage: its kind, and whatever belongs to it.
Emit = Callable[..., None]


def limit(emit: Emit, name: str, unit: str, samples: list[float], how: str) -> None:
    """Emit one of the card's limits: the median of ``samples`` in ``unit``, and how it was measured."""
    emit("limit", name=name, unit=unit, value=median(samples), spread=spread(samples), samples=samples, how=how)


def check(name: str, passed: bool, text: str) -> dict[str, Any]:
    """The line of a check."""
    return {"kind": "check", "name": name, "passed": passed, "text": text}


def words(why: object) -> str:
    """An error or a reason in one line; an error that nobody expected is printed as well."""
    if isinstance(why, Exception) and not isinstance(why, EXPECTED):
        traceback.print_exception(why)
        return f"{type(why).__name__}: {why}"
    return str(why) or type(why).__name__
