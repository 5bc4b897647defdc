"""The weights of a bundle as ``step.c`` reads them: matrices in panels, and the tables and gains beside them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.native.library import STORED, Matrix, Model, matrix_of
from par_runtime.backends.native.memory import empty
from par_runtime.bundle import Stored
from par_runtime.checked import shown_path
from par_runtime.dtypes import DTYPE, STORAGE, Float, to_float32
from par_runtime.loaded import LoadedFiles, check_memory
from par_runtime.manifest import MATRICES, NORMS
from par_runtime.quantised import SCALE

PAGE_BYTES = 4096


class Weights:
    """Matrices [K,N] packed into panels in one allocation, each for the arithmetic that it is multiplied in (matrix.h).

    ``model`` is the structure for ``step.c``. It points into this object's memory: keep the object while it is used.
    """

    def __init__(
        self, files: LoadedFiles, lib: ctypes.CDLL, pool: ctypes.c_void_p, cache_slots: int, arithmetic: str, cache: str
    ) -> None:
        """Read the weights of a bundle, with the threads of ``pool``.

        ``arithmetic``, ``cache``: of ``dtypes.ARITHMETICS`` and ``CACHES``.

        In "int8", matrices that are not quantised are multiplied in bf16. Raises BundleError where the file is shorter
        than its table, or there is less memory than the matrices take; OSError.
        """
        bundle = files.bundle
        m, table = bundle.model, bundle.weights
        layers = range(m["n_layers"])
        names = [f"layers.{i}.{matrix}" for matrix in MATRICES for i in layers] + ["output"]
        mapped = files.weights(max(at.offset + at.length for at in table.values()))
        file = np.frombuffer(mapped, np.uint8)
        packed = {name: _matrix(lib, table, name, arithmetic) for name in names}
        columns = -(-bundle.vocab_size // lib.parvis_panel()) * lib.parvis_panel()
        shapes = {name: table[name].shape for name in names} | {"output": (m["dim"], columns)}
        offsets, total = {}, 0
        for name in names:
            offsets[name] = total
            length = lib.parvis_matrix_bytes(ctypes.byref(packed[name]), *shapes[name])
            total += -(-length // PAGE_BYTES) * PAGE_BYTES
        check_memory(bundle, total)
        self._packed = empty(total, np.uint8)
        for name, matrix in packed.items():
            stored, scales = table[name], table.get(name + SCALE)
            matrix.data = self._packed.ctypes.data + offsets[name]
            values, factors = (None if at is None else _bytes_of(file, at, shapes[name][1]) for at in (stored, scales))
            failed = lib.parvis_pack_matrix(
                pool, ctypes.byref(matrix), _address(values), _address(factors),
                *shapes[name], int(name.endswith("w13")), matrix.data,
            )  # fmt: skip
            if failed:
                raise MemoryError(f"{shown_path(bundle.path)}: no memory to pack weights")
            _drop_pages(mapped, stored)
        gains = ["norm", *(f"layers.{i}.{norm}" for norm in NORMS for i in layers)]
        self._norms = {name: _float32(file, table[name]) for name in gains}
        self._embed = _view(file, table["embed"]).copy()
        self._cosine, self._sine = (_float32(file, table[name]) for name in ("cos", "sin"))

        matrices = {name: (Matrix * len(layers))(*(packed[f"layers.{i}.{name}"] for i in layers)) for name in MATRICES}
        norms = {norm: pointers(self._norms[f"layers.{i}.{norm}"].ctypes.data for i in layers) for norm in NORMS}
        self.model = Model(
            dim=m["dim"],
            n_layers=m["n_layers"],
            n_heads=m["n_heads"],
            head_dim=m["head_dim_padded"],
            ffn_dim=m["ffn_dim"],
            vocab_size=bundle.vocab_size,
            cache_slots=cache_slots,
            head_columns=columns,
            cache=STORED[DTYPE[cache]],
            attention_scale=m["head_dim"] ** -0.5,
            embed=self._embed.ctypes.data,
            embed_rows=len(self._embed),
            embed_stored=STORED[table["embed"].dtype],
            cosine=self._cosine.ctypes.data,
            sine=self._sine.ctypes.data,
            **matrices,
            **norms,
            norm=self._norms["norm"].ctypes.data,
            output=packed["output"],
        )


def _matrix(lib: ctypes.CDLL, table: Mapping[str, Stored], name: str, arithmetic: str) -> Matrix:
    """Matrix ``name`` of a table of weights, as this CPU multiplies it in ``arithmetic``; its ``data`` is missing."""
    stored, scales = table[name], table.get(name + SCALE)
    if scales is None:
        return matrix_of(lib, stored.dtype, arithmetic)
    return matrix_of(lib, stored.dtype, arithmetic, stored.shape[0] // scales.shape[0], scales.dtype)


def _bytes_of(file: NDArray[np.uint8], stored: Stored, columns: int) -> NDArray[np.uint8]:
    """The bytes of a matrix, or of its scales; a copy with zeros behind each row where it has fewer ``columns``."""
    rows = file[stored.offset : stored.offset + stored.length].reshape(stored.shape[0], -1)
    width = rows.shape[1] * columns // stored.shape[1]
    return rows if width == rows.shape[1] else np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _address(values: NDArray[np.uint8] | None) -> int | None:
    return None if values is None else values.ctypes.data


def pointers(addresses: Iterable[int]) -> Any:
    """A C array of pointers, one per layer."""
    values = list(addresses)
    return (ctypes.c_void_p * len(values))(*values)


def _drop_pages(mapped: mmap.mmap, stored: Stored) -> None:
    """Free the pages of a tensor that was read: they count as this process's memory while they are mapped."""
    if hasattr(mapped, "madvise"):
        start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, stored.offset + stored.length - start)


def _view(file: NDArray[np.uint8], stored: Stored) -> NDArray[Any]:
    """A tensor of the weights file in the numpy type that holds its bits."""
    return file[stored.offset : stored.offset + stored.length].view(STORAGE[stored.dtype]).reshape(stored.shape)


def _float32(file: NDArray[np.uint8], stored: Stored) -> Float:
    """A copy of a tensor of the weights file in fp32."""
    return np.array(to_float32(_view(file, stored), stored.dtype))
