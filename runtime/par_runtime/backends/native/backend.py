"""The step network in C (``step.c``), for a CPU with few rows and large weights. It is built where a compiler exists.

ONNX Runtime multiplies a few rows by a large matrix at half to two thirds of the memory bandwidth, and holds fp16 and
bf16 weights in fp32. This backend packs each matrix once into the order in which it is read, prefetches it, converts it
to fp32 in registers, and reads only the keys that a row attends to. Network, arithmetic (fp32) and noise are the same,
so tokens are those of ``step.onnx`` up to rounding, which the self-test of every load checks. ``decoding.py`` makes the
pixels.

Where it cannot run (no compiler at installation, an older CPU, sizes that it does not support), ``library.why_not``
gives the reason, and ``choose.py`` takes ONNX Runtime.

Letters: R rows, B images, q positions, N tokens, V codes, M = R*q, H heads, D' padded head size, S cache slots.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.backends.base import BackendInfo, Batch, closed_error
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.draws import draw_all
from par_runtime.backends.native.decoding import open_decoder
from par_runtime.backends.native.library import Step, library, why_not
from par_runtime.backends.native.weights import Weights, pointers
from par_runtime.backends.ort.cpu import MOST_IMAGES, TIE
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.dtypes import BYTES, Float, Int
from par_runtime.errors import BundleError
from par_runtime.loaded import LoadedFiles
from par_runtime.system import available_cores


class NativeBackend:
    """A bundle on the C kernels. ``backends.base.Backend`` describes the calls."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Pack the weights and start ``threads`` threads (default: all available cores).

        Raises BundleError where ``library.why_not`` has a reason.
        """
        lib = library()
        reason = why_not(bundle)
        if lib is None or reason is not None:
            raise BundleError(
                f"{bundle.path}: cannot run on the C kernels: {reason}; device (--device) cpu-ort takes ONNX Runtime"
            )
        self.bundle, self._lib = bundle, lib
        self._threads = threads or available_cores()
        self._files = LoadedFiles(bundle)
        self._decoder = None if bundle.image_size is None else open_decoder(self._files, self._threads)
        self.info = BackendInfo(
            runtime="native-cpu",
            version=f"{__version__} ({lib.parvis_instructions().decode()})",
            device="cpu",
            computes="fp32",
            weight_bytes=BYTES.get(bundle.precision, 4.0),
            cache_bytes=4.0,
            decoder="" if self._decoder is None else self._decoder.name,
        )
        self.max_images, self.tie = MOST_IMAGES, TIE
        self._slots = -(-bundle.n_tokens // lib.parvis_panel()) * lib.parvis_panel()
        self._weights = Weights(bundle, lib, self._slots)
        self._pool: int | None = lib.parvis_open(self._threads)
        if self._pool is None:
            raise MemoryError(f"{self._threads} threads: no memory for their pool")
        self._rows = 0  # R of _buffers
        self._record: int | None = None  # where the rows of the products of a call go
        self._keys = CacheRows(bundle.n_tokens)
        # Keys of all layers, then values, each at least R*H*S*D' long. numpy asks for huge pages for one large array.
        self._cache: Float = np.zeros((2 * bundle.model["n_layers"], 0), np.float32)
        self._buffers: dict[int, _StepBuffers] = {}  # by q, for the current number of rows

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        return _draw(self._guided(batch, ids, write), uniform, batch)

    def step_with_rows(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> tuple[Int, dict[str, Float]]:
        """As :meth:`step`, and what the call multiplied each matrix with: its name -> [M,K]."""
        m, sizes = ids.size, {name: self.bundle.weights[name].shape[0] for name in matrix_names(self.bundle)}
        record = np.empty(m * sum(sizes.values()), np.float32)
        self._record = record.ctypes.data
        try:
            tokens = self.step(batch, ids, write, uniform)
        finally:
            self._record = None
        parts = np.split(record, np.cumsum([m * size for size in sizes.values()])[:-1])
        return tokens, {name: part.reshape(m, -1) for name, part in zip(sizes, parts, strict=True)}

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        return self._guided(batch, ids, write).copy()

    def release(self, cache_rows: Int | None = None) -> None:
        self._keys.release(cache_rows)

    def _reserve(self, batch: Batch) -> None:
        """Allocate a cache for the rows of ``batch``, if needed; keys that are still needed stay."""
        m = self.bundle.model
        length = batch.cache_rows * m["n_heads"] * self._slots * m["head_dim_padded"]
        if batch.rows != self._rows:
            self._buffers.clear()
            self._rows = batch.rows
        if self._cache.shape[1] < length:
            self._buffers.clear()
            if not self._keys.count:  # the old cache is freed first, so that both are never held at once
                self._cache = self._cache[:, :0].copy()
            new = np.empty((2 * m["n_layers"], length), np.float32)
            # Written now, so that the first calls do not fault; layer by layer, so that Ctrl-C is heard in between.
            for layer, keys in zip(new, self._cache, strict=True):
                layer[: len(keys)], layer[len(keys) :] = keys, 0
            self._cache = new

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._pool is None:
            raise closed_error(self.bundle)
        assert self._decoder is not None, "the bundle ends at tokens"
        return self._decoder.run(tokens)

    def close(self) -> None:
        pool, self._pool = self._pool, None  # first, so that whatever interrupts this, no pool is freed twice
        if pool is not None:
            self._lib.parvis_close(pool)
        if self._decoder is not None:
            self._decoder.close()
        self._files.close()
        self._buffers.clear()
        self._cache = self._cache[:, :0].copy()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()

    def _guided(self, batch: Batch, ids: Int, write: Int) -> Float:
        """Guided logits [B,q,V] of one call; a view of a buffer that the next call of the same q overwrites."""
        if self._pool is None:
            raise closed_error(self.bundle)
        self._reserve(batch)
        self._keys.note(batch, write, ids.shape[1])
        rows = self._run(ids, write, batch.cache_row)
        cond = rows[: batch.images]
        if batch.rows == batch.images:
            return cond
        guided = self._buffers[ids.shape[1]].guided[: batch.images]  # allocated once: it is large
        for b, other in enumerate(batch.uncond_row):
            np.subtract(cond[b], rows[other], out=guided[b])
            guided[b] *= batch.guidance[b]
            guided[b] += rows[other]
        return guided

    def _run(self, ids: Int, write: Int, cache_row: Int) -> Float:
        """Logits [R,q,V] of ``ids`` [R,q]; a buffer that the next call of the same q overwrites.

        Row r has its keys in row ``cache_row[r]`` of the cache, which no other row has. It writes slots ``write[r]`` ..
        ``write[r] + q - 1``, which are also its positions, and attends to all slots up to the last of these.
        """
        query = ids.shape[1]
        buffers = self._buffers.get(query)
        if buffers is None:
            buffers = self._buffers[query] = _StepBuffers(self, len(ids), query)
        buffers.write[:] = write
        buffers.cache_row[:] = cache_row
        self._weights.embed(ids, buffers.x)
        buffers.step.record = self._record
        self._lib.parvis_step(self._pool, ctypes.byref(buffers.step))
        return buffers.logits


class _StepBuffers:
    """The buffers of calls with R rows of q positions, and the structure that gives ``step.c`` their addresses."""

    def __init__(self, backend: NativeBackend, rows: int, query: int) -> None:
        model, lib = backend._weights.model, backend._lib
        m, inner, layers = rows * query, model.n_heads * model.head_dim, model.n_layers
        scratch_bytes = lib.parvis_scratch(ctypes.byref(model), rows, query)
        self.write = np.zeros(rows, np.int64)
        self.cache_row = np.zeros(rows, np.int64)
        self.x = np.zeros((rows, query, model.dim), np.float32)
        self.logits = np.zeros((rows, query, model.vocab_size), np.float32)
        self.guided = np.zeros_like(self.logits)
        self._qkv = np.zeros((m, 3 * inner), np.float32)
        self._attention_out = np.zeros((m, inner), np.float32)
        self._ffn_hidden = np.zeros((m, model.ffn_dim), np.float32)
        self._scratch = np.zeros(backend._threads * scratch_bytes + 64, np.uint8)
        self.step = Step(
            model=ctypes.pointer(model),
            rows=rows,
            query=query,
            write=self.write.ctypes.data,
            cache_row=self.cache_row.ctypes.data,
            x=self.x.ctypes.data,
            keys=pointers(layer.ctypes.data for layer in backend._cache[:layers]),
            values=pointers(layer.ctypes.data for layer in backend._cache[layers:]),
            logits=self.logits.ctypes.data,
            qkv=self._qkv.ctypes.data,
            attention_out=self._attention_out.ctypes.data,
            ffn_hidden=self._ffn_hidden.ctypes.data,
            scratch=-(-self._scratch.ctypes.data // 64) * 64,
            scratch_bytes=scratch_bytes,
        )


def _draw(logits: Float, uniform: Float, batch: Batch) -> Int:
    """Tokens [B,q] of guided ``logits`` [B,q,V], as the sampling tail of the graphs draws them."""
    images, query, vocab = logits.shape
    temperature, top_p, top_k = (np.repeat(v, query) for v in (batch.temperature, batch.top_p, batch.top_k))
    rows = logits.reshape(-1, vocab)
    drawn = draw_all(rows, uniform.reshape(-1), temperature, top_k, top_p)  # type: ignore[arg-type]
    return drawn.reshape(images, query)
