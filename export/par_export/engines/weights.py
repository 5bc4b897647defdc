"""The weights of a bundle as a build wants them: in its precision, with the gains of the norms inside if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from par_export.engines.network import BuildError, MappedWeights
from par_export.graphs.writer import Stored, WeightTable

NUMPY_TYPE = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@contextmanager
def weights_in(
    file: Path, stored: WeightTable, compute: str, folder: Path, fold: bool = False
) -> Iterator[tuple[WeightTable, MappedWeights]]:
    """The weights ``stored`` in ``file``, mapped; converted to ``compute`` in a temporary file where they are not.

    Tables of angles stay fp32. ``fold`` puts the gains of the norms into the matrices behind them (see ``folded``).
    Raises BuildError where a value does not fit the precision.
    """
    other = {name for name, e in stored.entries.items() if e.dtype in NUMPY_TYPE and e.dtype != compute}
    other -= {"cos", "sin"}
    gains = {name: gain_of(name) for name in stored.entries if gain_of(name) in stored.entries} if fold else {}
    for name in gains:
        if stored.entries[name].dtype not in NUMPY_TYPE:
            raise BuildError(
                f"weight {name!r} is {stored.entries[name].dtype}: --norm after needs matrices that are not quantised"
            )
    if not other and not gains:
        data = MappedWeights(file)
        try:
            yield stored, data
        finally:
            data.close()
        return
    converted = folder / ".weights"
    table = WeightTable({})
    with file.open("rb") as source, converted.open("wb") as out:

        def read(name: str) -> np.ndarray:
            entry = stored.entries[name]
            source.seek(entry.offset)
            return np.frombuffer(source.read(entry.length), NUMPY_TYPE[entry.dtype]).reshape(entry.shape)

        for name, entry in stored.entries.items():
            if name in gains:
                matrix, table.folded[name] = folded(read(name), read(gains[name]), compute)
                raw, dtype = _convert(name, matrix, compute), compute
            elif name in other:
                raw, dtype = _convert(name, read(name), compute), compute
            else:
                source.seek(entry.offset)
                raw, dtype = source.read(entry.length), entry.dtype
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
    """The norm before a matrix, by name; "" where there is none."""
    layer, _, kind = matrix.rpartition(".")
    norm = {"wqkv": "attention_norm", "w13": "ffn_norm"}.get(kind)
    return f"{layer}.{norm}" if norm else ""


def folded(matrix: np.ndarray, gain: np.ndarray, compute: str) -> tuple[np.ndarray, int]:
    """``matrix`` (in, out) with its rows times ``gain`` and 2**-exponent: fp32, and the exponent.

    In fp16 the exponent makes overflow impossible: no column is longer than 1/sqrt(in), so no entry of ``x W`` is larger than
    the root mean square of x, which is in fp16 itself. bf16 and fp32 need none.
    """
    wide = matrix.astype(np.float32) * gain.astype(np.float32)[:, None]
    if compute != "float16":
        return wide, 0
    longest = float(np.sqrt((wide.astype(np.float64) ** 2).sum(0)).max()) * np.sqrt(len(wide))
    exponent = max(0, int(np.ceil(np.log2(longest)))) if longest > 0 else 0
    return wide * np.float32(2.0**-exponent), exponent


def _convert(name: str, values: np.ndarray, compute: str) -> bytes:
    with np.errstate(over="ignore"):
        out = values.astype(np.float32).astype(NUMPY_TYPE[compute])
    if not np.isfinite(out.astype(np.float32)).all():
        largest = np.abs(values.astype(np.float32)).max()
        raise BuildError(f"weight {name!r} reaches {largest:.3g}, beyond {compute}; give --precision bf16 or fp32")
    return out.tobytes()
