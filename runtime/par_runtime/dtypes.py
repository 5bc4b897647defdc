"""The one table of precisions (of stored numbers and of arithmetic), the types of arrays, and equality with arrays.

A *precision* is what a user names ("fp16"); a *dtype* is what ONNX, numpy and the manifest name ("float16").
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Float = NDArray[np.float32]

#: precision -> dtype, of all precisions that a bundle, an engine or a backend can have; the most exact first.
DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PRECISIONS = tuple(DTYPE)
#: What the C step can multiply in, the most exact first: activations are rounded to it. Where nothing else is proven
#: for a bundle (``parvis calibrate``), fp32.
ARITHMETICS = ("fp32", "bf16", "int8")
#: What the C step can keep keys and values in, the most exact first.
CACHES = ("fp32", "bf16")
#: What the C decoder can compute its 3x3 convolutions in, the most exact first: ``decoder.bf16_form`` says how.
DECODER_PRECISIONS = ("fp32", "bf16")
#: precision -> bytes of one stored number; quantised weights too, without their scales.
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
#: dtype -> the numpy type that holds its bits; numpy itself has no bf16.
STORAGE: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Beyond, ``(cond - uncond) * guidance / temperature`` could leave fp32. Far below, the guided logits are only the
#: difference, so a larger scale would change nothing.
MOST_GUIDANCE = 1e20
#: precision -> how far rounding alone may move a logit, relative to the largest |logit|. The error of a broken engine
#: is several times as large.
LOGIT_ROUNDING = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1, "int8": 2e-1}


class Rounding(NamedTuple):
    """What a CPU rounds to, by the names that ``Pipeline.load`` and a calibration have for it."""

    arithmetic: str = "fp32"  #: of :data:`ARITHMETICS`
    cache: str = "fp32"  #: of :data:`CACHES`
    decoder_precision: str = "fp32"  #: of :data:`DECODER_PRECISIONS`


AUTO = Rounding("auto", "auto", "auto")  #: what is proven for a bundle: ``Bundle.rounding``


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number of a dtype of :data:`STORAGE`."""
    return np.dtype(STORAGE[dtype]).itemsize


def to_float32(array: NDArray[Any], dtype: str) -> Float:
    """``array`` as fp32. Its numbers are of ``dtype``, held in the numpy type of :data:`STORAGE`.

    An fp32 array is returned itself, not a copy of it.
    """
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, np.float32)


def least_exact(*precisions: str) -> str:
    """The least exact of several precisions of :data:`LOGIT_ROUNDING`: what a comparison between them can promise."""
    return max(precisions, key=list(LOGIT_ROUNDING).index)


class ByValue:
    """Equality of a dataclass (with ``eq=False``) whose fields may be arrays, where Python's own raises ValueError.

    It can be hashed where all of its fields can.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(same_value(getattr(self, name), getattr(other, name)) for name in self._names())

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self._names()))

    def _names(self) -> list[str]:
        owner: Any = self
        return [field.name for field in fields(owner) if field.compare]


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal; arrays where all their numbers are."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return type(one) is type(other) and np.array_equal(one, other)
    return bool(one == other)
