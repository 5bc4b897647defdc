"""The weights of a bundle as ``step.c`` reads them: matrices in panels, and the tables and gains beside them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.native.library import ARITHMETIC, STORED, Matrix, Model
from par_runtime.backends.ort.sessions import check_memory
from par_runtime.bundle import WEIGHTS, Bundle, Stored
from par_runtime.dtypes import STORAGE, Float, Int, dtype_bytes, to_float32
from par_runtime.errors import BundleError
from par_runtime.manifest import MATRICES, NORMS

PAGE_BYTES = 4096


class Weights:
    """Matrices [K,N] packed into panels [N/panel,K,panel] in one allocation, in the precision in which they are stored.

    ``model`` is the structure for ``step.c``. It points into this object's memory: keep the object while it is used.
    """

    def __init__(self, bundle: Bundle, lib: ctypes.CDLL, cache_slots: int) -> None:
        """Read the weights file of ``bundle``.

        Raises BundleError where the file is shorter than its table, or there is less memory than the matrices take;
        OSError.
        """
        m, table = bundle.model, bundle.weights
        layers = range(m["n_layers"])
        names = [f"layers.{i}.{matrix}" for matrix in MATRICES for i in layers] + ["output"]
        with (bundle.path / WEIGHTS).open("rb") as opened:
            # Again, on the opened file: reading beyond its end would kill the process.
            size, needed = os.fstat(opened.fileno()).st_size, max(at.offset + at.length for at in table.values())
            if size < needed:
                raise BundleError(
                    f"{bundle.path / WEIGHTS}: truncated: {size} bytes, its tensors end at {needed}; copy the bundle "
                    "again or export it again"
                )
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        file = np.frombuffer(mapped, np.uint8)
        offsets, total = {}, 0
        for name in names:
            offsets[name] = total
            total += -(-table[name].length // PAGE_BYTES) * PAGE_BYTES
        check_memory(bundle, total)
        self._packed = np.empty(total, np.uint8)  # numpy asks the system for huge pages
        address = {name: self._packed.ctypes.data + offset for name, offset in offsets.items()}
        for name in names:
            stored = table[name]
            source = file.ctypes.data + stored.offset
            lib.parvis_pack(source, *stored.shape, dtype_bytes(stored.dtype), int(name.endswith("w13")), address[name])
            _drop_pages(mapped, stored)
        gains = ["norm", *(f"layers.{i}.{norm}" for norm in NORMS for i in layers)]
        self._norms = {name: _float32(file, table[name]) for name in gains}
        self._embed_dtype = table["embed"].dtype
        self._embed = _view(file, table["embed"]).copy()
        self._cosine, self._sine = (_float32(file, table[name]) for name in ("cos", "sin"))

        def packed(name: str) -> Matrix:
            stored = STORED[table[name].dtype]
            return Matrix(data=address[name], stored=stored, group=0, arithmetic=ARITHMETIC["fp32"])

        matrices = {name: (Matrix * len(layers))(*(packed(f"layers.{i}.{name}") for i in layers)) for name in MATRICES}
        norms = {norm: pointers(self._norms[f"layers.{i}.{norm}"].ctypes.data for i in layers) for norm in NORMS}
        self.model = Model(
            dim=m["dim"],
            n_layers=m["n_layers"],
            n_heads=m["n_heads"],
            head_dim=m["head_dim_padded"],
            ffn_dim=m["ffn_dim"],
            vocab_size=bundle.vocab_size,
            cache_slots=cache_slots,
            attention_scale=m["head_dim"] ** -0.5,
            cosine=self._cosine.ctypes.data,
            sine=self._sine.ctypes.data,
            **matrices,
            **norms,
            norm=self._norms["norm"].ctypes.data,
            output=packed("output"),
        )

    def embed(self, ids: Int, out: Float) -> None:
        """The rows of the embedding table for ``ids`` [R,q] into ``out`` [R,q,d]."""
        out[:] = to_float32(self._embed[ids], self._embed_dtype)


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
