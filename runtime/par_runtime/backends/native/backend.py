"""The step network in C (``step.c``), for a CPU with few rows and large weights. It is built where a compiler exists.

ONNX Runtime multiplies a few rows by a large matrix at half to two thirds of the memory bandwidth, and holds fp16 and
bf16 weights in fp32. This backend packs each matrix once into the order in which it is read, prefetches it, converts it
to fp32 in registers, and reads only the keys that a row attends to. Network, arithmetic (fp32) and noise are the same,
so tokens are those of ``step.onnx`` up to rounding, which the self-test of every load checks. A call draws its tokens
in C too. ``decoding.py`` makes the pixels.

Where it cannot run (no compiler at installation, an older CPU, sizes that it does not support), ``library.why_not``
gives the reason, and ``choose.py`` takes ONNX Runtime.

Letters: R rows, B images, q positions, N tokens, V codes, M = R*q, H heads, D' padded head size, S cache slots.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.backends.base import IMAGE_INPUTS, MOST_IN_FLIGHT, TIE_INT8, BackendInfo, Batch, closed_error
from par_runtime.backends.base import TIE as TIE_EXACT
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.native.decoding import open_decoder
from par_runtime.backends.native.library import Step, has_tiles, library, why_not
from par_runtime.backends.native.memory import empty
from par_runtime.backends.native.pool import Pool
from par_runtime.backends.native.weights import Weights, pointers
from par_runtime.backends.ort import needing
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.checked import shown_path
from par_runtime.dtypes import BYTES, DTYPE, STORAGE, Float, Int
from par_runtime.errors import BundleError
from par_runtime.forks import no_fork
from par_runtime.loaded import LoadedFiles
from par_runtime.system import available_cores

#: What a call gets of its batch; in C, rows are those of the batch, so there is no cond_row.
OF_A_BATCH = {"cache_row": np.int64} | {name: of for name, of in IMAGE_INPUTS.items() if name != "cond_row"}
#: What it computes in, or keeps keys in -> candidates this close, relative to the largest |logit|, may swap by
#: rounding. It moves logits by up to 2e-6, 2.1 % and 4 % of the largest one where this was measured; a broken backend
#: moves them by several times as much.
TIE = {"fp32": TIE_EXACT, "bf16": 6e-2, "int8": TIE_INT8}
NO_SUCH_ID = -2  #: what parvis_step returns where an id is no row of the embedding


class NativeBackend:
    """A bundle on the C kernels. ``backends.base.Backend`` describes the calls."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        arithmetic: str = "fp32",
        cache: str = "fp32",
        decoder_precision: str = "fp32",
    ) -> None:
        """Pack the weights and start ``threads`` threads (default: all available cores).

        ``arithmetic``: what matrices are multiplied in, one of ``dtypes.ARITHMETICS``; ``cache``: what keys and values
        are kept in, one of ``dtypes.CACHES``; ``decoder_precision``: as ``decoding.open_decoder`` has it.
        Raises BundleError where ``library.why_not`` has a reason.
        """
        reason = why_not(bundle)
        lib = library()
        if lib is None or reason is not None:
            raise BundleError(
                f"{bundle.path}: cannot run on the C kernels: {reason}; device (--device) cpu-ort takes ONNX Runtime"
            )
        self.bundle, self._lib = bundle, lib
        self._threads = threads or available_cores()
        self._files = LoadedFiles(bundle)
        with needing("decoding this bundle"), no_fork():  # ONNX Runtime, where the decoder in C cannot
            self._decoder = open_decoder(self._files, self._threads, decoder_precision)
        computes = "bf16" if arithmetic == "int8" and not bundle.quantised else arithmetic
        variant = [lib.parvis_instructions().decode()]
        variant += ["amx"] * (has_tiles(lib) and (computes, cache) != ("fp32", "fp32"))
        variant += [computes] * (computes != "fp32") + [f"{cache} cache"] * (cache != "fp32")
        self.info = BackendInfo(
            runtime="native-cpu",
            version=f"{__version__} ({', '.join(variant)})",
            device="cpu",
            computes=computes,
            weight_bytes=bytes_read(bundle, computes),
            cache_bytes=BYTES[cache],
            decoder=self._decoder.name,
            decoder_computes=self._decoder.computes,
        )
        self.max_images, self.tie = MOST_IN_FLIGHT, max(TIE[computes], TIE[cache])
        self._slots = -(-bundle.n_tokens // lib.parvis_panel()) * lib.parvis_panel()
        self._pool: Pool | None = Pool(lib, "parvis_", self._threads)
        try:
            self._weights = Weights(self._files, lib, self._pool.handle, self._slots, arithmetic, cache)
        except BaseException:  # Ctrl-C too: the error may hold this object for long
            self._pool.close()
            raise
        self._batch: Batch | None = None  # of _calls
        self._record: int | None = None  # where the rows of the products of a call go
        self._keys = CacheRows(bundle.n_tokens)
        # Keys of all layers, then values, each at least R*H*S*D' long. numpy asks for huge pages for one large array.
        self._cache = np.zeros((2 * bundle.model["n_layers"], 0), STORAGE[DTYPE[cache]])
        self._calls: dict[int, _Call] = {}  # by q

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        call = self._prepare(batch, ids, write)
        call.uniform[:] = uniform
        self._run(call, call.tokens_address, None)
        return call.tokens.copy()

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
        call = self._prepare(batch, ids, write)
        out = np.empty((batch.images, ids.shape[1], self.bundle.vocab_size), np.float32)
        self._run(call, None, out.ctypes.data)
        return out

    def release(self, cache_rows: Int | None = None) -> None:
        self._keys.release(cache_rows)

    def _prepare(self, batch: Batch, ids: Int, write: Int) -> _Call:
        """The buffers of a call, filled; what is drawn with is missing. The cache has room for its rows.

        Row r has its keys in row ``cache_row[r]`` of the cache, which no other row has. It writes slots ``write[r]`` ..
        ``write[r] + q - 1``, which are also its positions, and attends to all slots up to the last of these.
        """
        if self._pool is None:
            raise closed_error(self.bundle)
        if batch is not self._batch:
            self._reserve(batch)
        self._keys.note(batch, write, ids.shape[1])
        call = self._calls.get(ids.shape[1])
        if call is None:
            call = self._calls[ids.shape[1]] = _Call(self, batch, ids.shape[1])
        call.ids[:] = ids
        call.write[:] = write
        return call

    def _reserve(self, batch: Batch) -> None:
        """Allocate a cache for the rows of ``batch``, if needed; keys that are still needed stay."""
        m = self.bundle.model
        length = batch.cache_rows * m["n_heads"] * self._slots * m["head_dim_padded"]
        if self._batch is None or (batch.rows, batch.images) != (self._batch.rows, self._batch.images):
            self._forget_calls()
        if self._cache.shape[1] < length:
            self._forget_calls()
            if not self._keys.count:  # the old cache is freed first, so that both are never held at once
                self._cache = self._cache[:, :0].copy()
            new = empty((2 * m["n_layers"], length), self._cache.dtype)
            # Written now, so that the first calls do not fault; layer by layer, so that Ctrl-C is heard in between.
            for layer, keys in zip(new, self._cache, strict=True):
                layer[: len(keys)], layer[len(keys) :] = keys, 0
            self._cache = new
        for call in self._calls.values():
            call.take(batch)
        self._batch = batch

    def _forget_calls(self) -> None:
        """Free the buffers of calls, which also hold addresses of the cache."""
        self._batch = None
        if self._pool is not None:
            self._lib.parvis_settle(self._pool.handle)
        self._calls.clear()

    def _run(self, call: _Call, tokens: int | None, logits: int | None) -> None:
        """Make a call whose results go to these addresses."""
        call.step.tokens, call.step.logits, call.step.record = tokens, logits, self._record
        assert self._pool is not None
        failed = self._lib.parvis_step(self._pool.handle, call.address)
        if failed == NO_SUCH_ID:
            rows = self._weights.model.embed_rows
            raise IndexError(f"ids from {call.ids.min()} to {call.ids.max()}; the embedding has rows 0..{rows - 1}")
        if failed:
            raise MemoryError(f"{shown_path(self.bundle.path)}: no memory for a call")

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._pool is None:
            raise closed_error(self.bundle)
        return self._decoder.run(tokens)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()  # first: a thread that is late may still read the memory of its call
        self._calls.clear()
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(self._files.close)
            parts.callback(self._decoder.close)
            self._cache = self._cache[:, :0].copy()

    def __del__(self) -> None:
        if (pool := getattr(self, "_pool", None)) is not None:
            pool.close()  # before the memory of its calls is freed


def bytes_read(bundle: Bundle, computes: str) -> float:
    """Bytes of one parameter as a call reads it: as it is stored, but fp32 as bf16 where it is multiplied so."""
    if computes == "fp32" or bundle.precision != "fp32":
        return bundle.weight_bytes
    return bundle.bytes_read(BYTES["bf16"], stored_scales=True)


class _Call:
    """The buffers of calls with R rows of q positions, and the structure that gives ``step.c`` their addresses."""

    def __init__(self, backend: NativeBackend, batch: Batch, query: int) -> None:
        model, lib = backend._weights.model, backend._lib
        rows, images, layers = batch.rows, batch.images, model.n_layers
        self.ids = np.zeros((rows, query), np.int64)
        self.write = np.zeros(rows, np.int64)
        self.uniform = np.zeros((images, query), np.float32)
        self._taken: dict[str, NDArray[Any]] = {
            name: np.array(getattr(batch, name), of) for name, of in OF_A_BATCH.items()
        }
        self.tokens = np.zeros((images, query), np.int64)
        self.tokens_address = self.tokens.ctypes.data
        # A workspace of its own: a thread that is late in an earlier call may still use its part of that call's.
        size = lib.parvis_workspace(ctypes.byref(model), rows, query, backend._threads)
        self._workspace = np.zeros(size + 64, np.uint8)
        self.step = Step(
            model=ctypes.pointer(model),
            rows=rows,
            query=query,
            images=images,
            ids=self.ids.ctypes.data,
            write=self.write.ctypes.data,
            uniform=self.uniform.ctypes.data,
            **{name: array.ctypes.data for name, array in self._taken.items()},
            keys=pointers(layer.ctypes.data for layer in backend._cache[:layers]),
            values=pointers(layer.ctypes.data for layer in backend._cache[layers:]),
            workspace=-(-self._workspace.ctypes.data // 64) * 64,
        )
        self.address = ctypes.byref(self.step)

    def take(self, batch: Batch) -> None:
        """The rows and settings of a batch of as many rows and images."""
        for name, array in self._taken.items():
            array[:] = getattr(batch, name)
