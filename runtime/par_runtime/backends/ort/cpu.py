"""ONNX Runtime on the CPU: one session for every phase, static buffers bound once, the cache updated in place.

The cache window grows in buckets: a call attends over the whole window, so early calls should not pay for the
full length. There is one allocation of the full length for the keys and one for the values of each layer. A window is
the beginning of it, in another shape; when the window grows, the heads are moved in place. The allocations are kept,
because the page faults of new memory cost more than the attention over it.

Letters: R' rows that are run (those of the batch, where its cache rows are the first ones), B images, q positions of
one call, S slots of the window, N tokens, H heads, D' padded head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backends.base import (
    IMAGE_INPUTS,
    MOST_IN_FLIGHT,
    TIE,
    TIE_INT8,
    BackendInfo,
    Batch,
    Decoder,
    closed_error,
)
from par_runtime.backends.cache_rows import CacheRows
from par_runtime.backends.ort.decoding import open_ort_decoder
from par_runtime.backends.ort.sessions import (
    OPSET24_SINCE,
    SPINNING,
    decoder_options,
    explained,
    fuses,
    lost_in_fork,
    open_cpu_session,
    session_options,
    set_arithmetic,
    version,
    weight_bytes,
)
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float, Int
from par_runtime.errors import BundleError
from par_runtime.forks import Calls, keep_forever, tell_of_forks
from par_runtime.loaded import LoadedFiles

BUCKETS = 8  #: cache windows are multiples of N/8, measured best on 2 cores (docs/design.md)


def window(slots_needed: int, n_tokens: int) -> int:
    """Slots S of the cache window that holds ``slots_needed``: the next multiple of N/8."""
    unit = max(-(-n_tokens // BUCKETS), 1)
    return min(-(-slots_needed // unit) * unit, n_tokens)


class OrtBackend:
    """A bundle on ONNX Runtime's CPU provider; ``graph`` names another step graph than the best that it runs.

    ``arithmetic`` "int8" rounds activations to int8 in front of quantised weights; every other value means fp32.
    ``decoder`` makes another decoder than ONNX Runtime's.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        graph: str | None = None,
        arithmetic: str = "fp32",
        decoder: Callable[[LoadedFiles], Decoder] | None = None,
    ) -> None:
        rounds = arithmetic == "int8" and fuses(bundle, arithmetic)
        self.bundle = bundle
        options = session_options(threads)
        # Worker threads spin between operators, because the next call follows at once.
        options.add_session_config_entry(SPINNING, "1")
        set_arithmetic(options, bundle, arithmetic)
        self._options = options
        self._files = LoadedFiles(bundle)
        self._decoder: Decoder = (
            open_ort_decoder(self._files, decoder_options(threads), huge_pages=True)
            if decoder is None
            else decoder(self._files)
        )
        self.info = BackendInfo(
            runtime="onnxruntime-cpu",
            version=ort.__version__ + (f" ({graph})" if graph else ""),
            device="cpu",
            computes="int8" if rounds else "fp32",
            weight_bytes=weight_bytes(bundle, arithmetic),
            cache_bytes=4.0,
            decoder=self._decoder.name,
            decoder_computes=self._decoder.computes,
        )
        self.max_images = MOST_IN_FLIGHT
        self.tie = TIE_INT8 if rounds else TIE
        self._graph = graph or ("step" if version() >= OPSET24_SINCE else "step_opset23")
        self._closed = False
        self._calls = Calls()
        self._step: ort.InferenceSession | None = None  # None in a forked process, until it is opened again
        self._open_step()
        if bundle.cache.dtype != "float32":
            raise BundleError(
                f"{bundle.path}: cache of dtype {bundle.cache.dtype!r}; the CPU needs float32; export the bundle again"
            )
        self._keys = CacheRows(bundle.n_tokens)
        self._slots = 0  # S of the window that holds the keys
        self._caches: list[Float] = []  # flat, in the order of bundle.cache.inputs; at least R'*H*N*D' long
        self._bound: dict[tuple[int, int], _Bound] = {}  # by (q, S), of the current number of rows and images
        self._shape = (0, 0)  # that number
        tell_of_forks(self)

    def _open_step(self) -> ort.InferenceSession:
        """The session of the step, opened where there is none."""
        if self._closed:
            raise closed_error(self.bundle)
        if self._step is None:
            # On huge pages, because every call reads all weights of the session.
            self._step = open_cpu_session(self._files, self._graph, self._options, huge_pages=True)
        return self._step

    def after_fork(self) -> None:
        if (self._calls.lost_in_fork() or lost_in_fork(self._options)) and self._step is not None:
            keep_forever(self._step, *self._bound.values())
            self._step = None
            self._bound.clear()

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        session = self._open_step()
        bound = self._prepare(session, batch, ids, write)
        bound.uniform[:] = uniform
        with self._calls:
            _run(session, bound.binding)
        return bound.tokens[batch.cache_row[: batch.images]]

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        session = self._open_step()
        bound = self._prepare(session, batch, ids, write)
        bound.uniform[:] = 0
        out = np.empty((batch.images, ids.shape[1], self.bundle.vocab_size), np.float32)
        self._bound.clear()  # before binding: whatever interrupts this call, no later one writes into memory of `out`
        _bind(bound.binding, "logits", out, output=True)
        with self._calls:
            _run(session, bound.binding)
        return out

    def release(self, cache_rows: Int | None = None) -> None:
        self._keys.release(cache_rows)

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._closed:
            raise closed_error(self.bundle)
        return self._decoder.run(tokens)

    def close(self) -> None:
        self._closed = True
        self._bound.clear()
        self._step = None
        self._caches.clear()
        self._keys.release()
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(self._files.close)
            parts.callback(self._decoder.close)

    def _prepare(self, session: ort.InferenceSession, batch: Batch, ids: Int, write: Int) -> _Bound:
        """The bound buffers of this call, filled with all inputs except the noise."""
        self._files.check()
        query, run = ids.shape[1], batch.cache_rows
        self._reserve(run)
        held = self._keys.count
        ids, write = self._keys.write(batch, ids, write, run)
        self._grow(window(max(int(write.max()) + query, self._keys.longest), self.bundle.n_tokens), held)
        if (run, batch.images) != self._shape:
            self._bound.clear()
            self._shape = (run, batch.images)
        key = (query, self._slots)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = _Bound(session, self.bundle, batch, query, self._window(run))
        bound.set_batch(batch)
        bound.ids[:] = ids
        bound.positions[:] = write[:, None] + np.arange(query)
        bound.write[:] = write
        bound.length[:] = write + query
        return bound

    def _reserve(self, rows: int) -> None:
        """Allocate caches of at least ``rows`` rows, if needed; the keys that are still needed stay."""
        layout = self.bundle.cache
        length = rows * layout.heads * self.bundle.n_tokens * layout.head_dim
        if self._caches and all(flat.size >= length for flat in self._caches):
            return
        self._bound.clear()
        kept = self._keys.count * layout.heads * self._slots * layout.head_dim
        if not kept:
            self._caches = []  # before allocating, so that the old and the new are never held together
            # full(), not zeros(): it writes every page now instead of faulting inside the first calls.
            self._caches = [np.full(length, 0, np.float32) for _ in layout.inputs]
            return
        for i in range(len(layout.inputs)):
            if self._caches[i].size < length:  # some may be large enough: an earlier growth ran out of memory
                new = np.full(length, 0, np.float32)
                new[:kept] = self._caches[i][:kept]
                self._caches[i] = new

    def _grow(self, slots: int, rows: int) -> None:
        """Make the window at least ``slots`` long. The first ``rows`` rows keep their keys; for 0 it may shrink."""
        head_dim, heads = self.bundle.cache.head_dim, self.bundle.cache.heads
        if slots > self._slots and rows:
            for flat in self._caches:
                spread(flat, rows * heads, self._slots * head_dim, slots * head_dim)
        if slots > self._slots or not rows:
            self._slots = slots

    def _window(self, rows: int) -> list[Float]:
        """The cache buffers [R',H,S,D'] of the current window, in the order of ``bundle.cache.inputs``."""
        layout = self.bundle.cache
        shape = (rows, layout.heads, self._slots, layout.head_dim)
        return [flat[: math.prod(shape)].reshape(shape) for flat in self._caches]


def spread(flat: Float, count: int, old: int, new: int) -> None:
    """Move ``count`` pieces of length ``old``, which lie end to end in ``flat``, so that each starts ``new`` >= ``old``
    numbers after the one before it.

    In place, from the end, in runs whose target lies beyond their source, so that nothing unread is overwritten.
    Between the pieces, old content remains.
    """
    source, target = flat[: count * old].reshape(count, old), flat[: count * new].reshape(count, new)
    end = count
    while end > 1:  # the first piece stays where it is
        first = min(-(-end * old // new), end - 1)
        target[first:end, :old] = source[first:end]
        end = first


class _Bound:
    """Static input and output buffers of one query length and cache window, bound once."""

    def __init__(
        self, session: ort.InferenceSession, bundle: Bundle, batch: Batch, query: int, caches: list[Float]
    ) -> None:
        rows, images = len(caches[0]), batch.images
        self.ids = np.zeros((rows, query), np.int64)
        self.positions = np.zeros((rows, query), np.int64)
        self.write = np.zeros(rows, np.int64)
        self.length = np.zeros(rows, np.int64)
        self.uniform = np.zeros((images, query), np.float32)
        self.tokens = np.zeros((rows, query), np.int64)
        self._batch: Batch | None = None
        self._settings = {name: np.zeros(images, dtype) for name, dtype in IMAGE_INPUTS.items()}
        self.binding = session.io_binding()
        for name in ("ids", "positions", "write", "length", "uniform"):
            _bind(self.binding, name, getattr(self, name))
        for name, array in self._settings.items():
            _bind(self.binding, name, array)
        _bind(self.binding, "tokens", self.tokens, output=True)
        # One buffer as input and output: this is what makes the cache update in place.
        for past, present, buffer in zip(bundle.cache.inputs, bundle.cache.outputs, caches, strict=True):
            _bind(self.binding, past, buffer)
            _bind(self.binding, present, buffer, output=True)

    def set_batch(self, batch: Batch) -> None:
        """Copy the settings of ``batch`` into the buffers, unless they are there already."""
        if batch is not self._batch:
            self._batch = batch
            for name, values in batch.per_image().items():
                self._settings[name][:] = values


def _bind(binding: ort.IOBinding, name: str, array: NDArray[Any], output: bool = False) -> None:
    bind = binding.bind_output if output else binding.bind_input
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise explained(error) from error
