"""The weights of a bundle as a build needs them: mapped, in its precision, on request with the norms folded in."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from par_export.errors import BuildError
from par_export.graphs.writer import WeightTable
from par_runtime.bundle import Stored
from par_runtime.checked import open_regular
from par_runtime.dtypes import STORAGE
from par_runtime.quantised import LEAST_CODE, SCALE
from par_runtime.system import naming

#: dtype -> numpy's own; ml_dtypes has those that numpy lacks, under the same names.
NUMPY_DTYPE: dict[str, np.dtype] = {dtype: np.dtype(getattr(ml_dtypes, dtype, dtype)) for dtype in STORAGE}

_BLOCK_BYTES = 16 * 2**20  #: read at a time


class MappedWeights:
    """A weights file mapped into memory at ``address``; its pages can be released while a build goes on."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        try:
            with naming(path):
                self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        except BaseException:
            self._file.close()
            raise
        self._array = np.frombuffer(self._map, np.uint8)  # for its address
        self.address = int(self._array.ctypes.data)

    def release(self) -> None:
        """Release the pages that were read; they are read from the file again if needed."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file."""
        del self._array
        self._map.close()
        self._file.close()


@contextmanager
def weights_in(
    file: Path, stored: WeightTable, compute: str, folder: Path, fold: bool = False
) -> Iterator[tuple[WeightTable, MappedWeights]]:
    """Yield the weights ``stored`` in ``file`` in the dtype ``compute``, mapped, with the table of where each lies.

    Where they are stored otherwise, they are converted into a temporary file in ``folder``. Rotary tables stay fp32.
    Quantised matrices stay as they are, their scales are converted.
    ``fold`` multiplies the gains of the norms into the matrices that follow them (see :func:`folded`). Raises
    BuildError where a value does not fit the precision, OSError.
    """
    converted_names = {name for name, e in stored.entries.items() if e.dtype in NUMPY_DTYPE and e.dtype != compute}
    converted_names -= {"cos", "sin"}
    gains = {name: gain_of(name) for name in stored.entries if gain_of(name) in stored.entries} if fold else {}
    for name in gains:
        if stored.entries[name].dtype not in NUMPY_DTYPE:
            raise BuildError(
                f"weight {name!r} is {stored.entries[name].dtype}: --norm after needs matrices that are not quantised"
            )
    if not converted_names and not gains:
        data = MappedWeights(file)
        try:
            yield stored, data
        finally:
            data.close()
        return
    converted = folder / ".weights"
    table = WeightTable({})
    with open_regular(file) as source, converted.open("wb") as out:

        def content(entry: Stored) -> bytes:
            with naming(file):
                source.seek(entry.offset)
                return source.read(entry.length)

        def read(name: str) -> np.ndarray:
            entry = stored.entries[name]
            return np.frombuffer(content(entry), NUMPY_DTYPE[entry.dtype]).reshape(entry.shape)

        for name, entry in stored.entries.items():
            if name in gains:
                matrix, table.folded[name] = folded(read(name), read(gains[name]), compute)
                raw, dtype = _convert(name, matrix, compute), compute
            elif name in converted_names and name.endswith(SCALE):
                codes = stored.entries[name.removesuffix(SCALE)]
                raw, dtype = _convert_scales(name, read(name), codes.dtype, compute), compute
            elif name in converted_names:
                raw, dtype = _convert(name, read(name), compute), compute
            else:
                raw, dtype = content(entry), entry.dtype
            out.write(b"\0" * (-out.tell() % 4096))
            table.entries[name] = Stored(dtype, entry.shape, out.tell(), len(raw))
            out.write(raw)
    data = MappedWeights(converted)
    try:
        yield table, data
    finally:
        data.close()
        converted.unlink(missing_ok=True)


def gain_of(matrix: str) -> str:
    """The name of the norm before the matrix of that name; "" where there is none."""
    layer, _, kind = matrix.rpartition(".")
    norm = {"wqkv": "attention_norm", "w13": "ffn_norm"}.get(kind)
    return f"{layer}.{norm}" if norm else ""


def folded(matrix: np.ndarray, gain: np.ndarray, compute: str) -> tuple[np.ndarray, int]:
    """``matrix`` (in, out) with its rows multiplied by ``gain`` and by 2**-exponent: in fp32, and the exponent.

    For fp16 the exponent makes overflow impossible: no column is longer than 1/sqrt(in), so no entry of ``x W`` is
    larger than the root mean square of x, which fits into fp16. bf16 and fp32 need no exponent.
    """
    wide = matrix.astype(np.float32) * gain.astype(np.float32)[:, None]
    if compute != "float16":
        return wide, 0
    longest = float(np.sqrt((wide.astype(np.float64) ** 2).sum(0)).max()) * np.sqrt(len(wide))
    exponent = max(0, int(np.ceil(np.log2(longest)))) if longest > 0 else 0
    return wide * np.float32(2.0**-exponent), exponent


def check_range(file: Path, stored: Mapping[str, Stored], compute: str, cure: str) -> None:
    """Raise BuildError where a number of the tensors ``stored`` in ``file`` does not fit the dtype ``compute``.

    Tensors of that dtype are not read. ``cure``: what the message says to give. Raises OSError.
    """
    with naming(file), open_regular(file) as source:
        for name, entry in stored.items():
            if entry.dtype == compute or entry.dtype not in NUMPY_DTYPE:
                continue
            # Without its sign a number's bits grow with it, infinities and NaN last, so only the largest is converted.
            dtype = NUMPY_DTYPE[entry.dtype]
            bits = np.dtype(f"u{dtype.itemsize}")
            unsigned, largest = bits.type(2 ** (8 * dtype.itemsize - 1) - 1), bits.type(0)
            source.seek(entry.offset)
            for start in range(0, entry.length, _BLOCK_BYTES):
                block = np.frombuffer(source.read(min(_BLOCK_BYTES, entry.length - start)), bits)
                largest = max(largest, (block & unsigned).max())
            _convert(name, np.array([largest]).view(dtype), compute, cure)


def _convert_scales(name: str, scales: np.ndarray, codes: str, compute: str) -> bytes:
    """``scales`` in the dtype ``compute``: positive, as TensorRT wants them, and so that the largest code fits too."""
    wide = scales.astype(np.float32)
    _convert(name.removesuffix(SCALE), wide * LEAST_CODE[codes], compute)
    least = float(ml_dtypes.finfo(NUMPY_DTYPE[compute]).smallest_subnormal)
    return _convert(name, np.where(wide > 0, np.maximum(wide, least), wide), compute)


def _convert(name: str, values: np.ndarray, compute: str, cure: str = "--precision bf16 or fp32") -> bytes:
    with np.errstate(over="ignore"):
        out = values.astype(np.float32).astype(NUMPY_DTYPE[compute])
    if not np.isfinite(out.astype(np.float32)).all():
        largest = np.abs(values.astype(np.float32)).max()
        raise BuildError(f"weight {name!r} reaches {largest:.3g}, beyond {compute}; give {cure}")
    return out.tobytes()
