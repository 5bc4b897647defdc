"""ONNX Runtime on the CPU: one session for every phase, static buffers bound once, the cache updated in place.

The cache window grows in buckets: a call attends over the whole window, so early calls should not pay for the
full length. One allocation per layer and side holds the full length; a window is its beginning under another shape, and
growing moves the heads apart in place. The allocations are kept, so their pages stay touched (first-touch page faults
cost more than the attention they serve).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backends.base import Batch
from par_runtime.backends.ort.huge_pages import use_huge_pages
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float, Int
from par_runtime.errors import BundleError
from par_runtime.system import available_cores

#: The first release with every operator of opset 24 that ``step.onnx`` uses; before, ``step_opset23.onnx`` runs.
OPSET24_SINCE = (1, 25)
MOST_IMAGES = 4096  #: beyond, caches are tens of gigabytes for the smallest of models
TIE = 1e-4  #: kernels of other CPUs round differently; the export's own measured errors are 50 times smaller
NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory")  #: how its allocators (the last: CUDA) say it
BUCKETS = 8  #: cache windows are multiples of N/8, measured best on 2 cores (docs/design.md)


def window(slots_needed: int, n_tokens: int) -> int:
    """Slots S of the cache window that holds ``slots_needed``: the next multiple of N/8."""
    unit = max(-(-n_tokens // BUCKETS), 1)
    return min(-(-slots_needed // unit) * unit, n_tokens)


class OrtBackend:
    """A bundle on ONNX Runtime's CPU provider. See ``backend.Backend`` for the calls."""

    def __init__(self, bundle: Bundle, threads: int | None = None, graph: str | None = None) -> None:
        self.bundle = bundle
        self.name = f"onnxruntime-cpu {ort.__version__}" + (f" ({graph})" if graph else "")
        self.max_images = MOST_IMAGES
        self.tie = TIE
        options = session_options(threads)
        # Calls follow each other at once: worker threads that spin between operators are worth their heat.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        self._options = options
        version = tuple(int(part) for part in ort.__version__.split(".")[:2])
        step = "step" if version >= OPSET24_SINCE else "step_opset23"
        self._step = self._session(graph or step)
        use_huge_pages()  # every call reads all of what the session holds
        self._decoder: ort.InferenceSession | None = None
        self._batch: Batch | None = None
        if bundle.cache.dtype != "float32":
            raise BundleError(
                f"{bundle.path}: cache of dtype {bundle.cache.dtype!r}; the CPU needs float32; export the bundle again"
            )
        self._slots = 0  # S of the window that holds the batch's keys
        self._caches: list[Float] = []  # flat, in the order of bundle.cache.inputs; at least R*H*N*D' long
        self._calls: dict[tuple[int, int], _Call] = {}  # (q, S) of the current batch shape

    def _session(self, name: str) -> ort.InferenceSession:
        return open_session(self.bundle, name, self._options)

    def start(self, batch: Batch) -> None:
        if self._batch is None or (batch.rows, batch.images) != (self._batch.rows, self._batch.images):
            self._calls.clear()
        layout = self.bundle.cache
        length = batch.rows * layout.heads * self.bundle.n_tokens * layout.head_dim
        if not self._caches or self._caches[0].size < length:
            self._calls.clear()
            self._caches.clear()  # before allocating, so that the old and the new are never held together
            # full(), not zeros(): it writes every page now instead of faulting inside the first calls.
            self._caches = [np.full(length, 0, np.float32) for _ in layout.inputs]
        # Keys of an earlier batch may remain: they are masked until written, and finite, which is all it takes.
        self._batch = batch
        self._slots = 0
        for call in self._calls.values():
            call.set_batch(batch)

    def step(self, ids: Int, write: int, uniform: Float) -> Int:
        call = self._call(ids, write)
        call.uniform[:] = uniform
        _run(self._step, call.binding)
        return call.tokens

    def logits(self, ids: Int, write: int) -> Float:
        call = self._call(ids, write)
        call.uniform[:] = 0
        out = np.empty((call.uniform.shape[0], ids.shape[1], self.bundle.vocab_size), np.float32)
        _bind(call.binding, "logits", out, output=True)
        _run(self._step, call.binding)
        self._calls.clear()  # the binding now writes logits that nobody owns
        return out

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._decoder is None:
            self._decoder = self._session("decoder")
            use_huge_pages()
        return run_decoder(self._decoder, tokens, explained)

    def whole(self, batch: Batch, class_ids: Int, noise: Float, decode: bool) -> None:
        return None  # every call is run by the pipeline

    def close(self) -> None:
        self._calls.clear()
        self._caches.clear()

    def _call(self, ids: Int, write: int) -> _Call:
        """The bound buffers for this query length and cache window, filled with this call's positions."""
        assert self._batch is not None, "start() comes before step()"
        query = ids.shape[1]
        slots = window(write + query, self.bundle.n_tokens)
        self._grow(slots)
        call = self._calls.get((query, slots))
        if call is None:
            call = _Call(self._step, self.bundle, self._batch, query, self._window())
            self._calls[query, slots] = call
        call.ids[:] = ids
        call.positions[:] = np.arange(write, write + query)
        call.write[:] = write
        call.length[:] = write + query
        return call

    def _grow(self, slots: int) -> None:
        """Make the cache window ``slots`` long; it keeps what it held."""
        assert self._batch is not None
        if slots == self._slots:
            return
        layout = self.bundle.cache
        for flat in self._caches:
            spread(flat, self._batch.rows * layout.heads, self._slots * layout.head_dim, slots * layout.head_dim)
        self._slots = slots

    def _window(self) -> list[Float]:
        """The cache buffers [R,H,S,D'] of the current window, in the order of ``bundle.cache.inputs``."""
        assert self._batch is not None
        layout = self.bundle.cache
        shape = (self._batch.rows, layout.heads, self._slots, layout.head_dim)
        return [flat[: math.prod(shape)].reshape(shape) for flat in self._caches]


def spread(flat: Float, count: int, old: int, new: int) -> None:
    """Move ``count`` pieces of length ``old``, which lie end to end in ``flat``, to starts ``new`` >= ``old`` apart.

    In place, from the end, in runs whose target lies beyond their source, so that nothing unread is overwritten.
    What lies between the pieces afterwards is old content.
    """
    source, target = flat[: count * old].reshape(count, old), flat[: count * new].reshape(count, new)
    end = count
    while end > 1:  # the first piece stays where it is
        first = min(-(-end * old // new), end - 1)
        target[first:end, :old] = source[first:end]
        end = first


class _Call:
    """Static input and output buffers of one query length and cache window, bound once."""

    def __init__(
        self, session: ort.InferenceSession, bundle: Bundle, batch: Batch, query: int, caches: list[Float]
    ) -> None:
        rows, images = batch.rows, batch.images
        self.ids = np.zeros((rows, query), np.int64)
        self.positions = np.zeros((rows, query), np.int64)
        self.write = np.zeros(rows, np.int64)
        self.length = np.zeros(rows, np.int64)
        self.uniform = np.zeros((images, query), np.float32)
        self.tokens = np.zeros((rows, query), np.int64)
        self._settings: dict[str, NDArray[Any]] = {
            "uncond_row": np.zeros(images, np.int64),
            "guidance": np.zeros(images, np.float32),
            "temperature": np.zeros(images, np.float32),
            "top_k": np.zeros(images, np.int64),
            "top_p": np.zeros(images, np.float32),
        }
        self.set_batch(batch)
        self._cond_row = np.arange(images, dtype=np.int64)
        self.binding = session.io_binding()
        for name in ("ids", "positions", "write", "length", "uniform"):
            _bind(self.binding, name, getattr(self, name))
        for name, array in self._settings.items():
            _bind(self.binding, name, array)
        _bind(self.binding, "cond_row", self._cond_row)
        _bind(self.binding, "tokens", self.tokens, output=True)
        # One buffer as input and output: this is what makes the cache update in place.
        for past, present, buffer in zip(bundle.cache.inputs, bundle.cache.outputs, caches, strict=True):
            _bind(self.binding, past, buffer)
            _bind(self.binding, present, buffer, output=True)

    def set_batch(self, batch: Batch) -> None:
        for name, array in self._settings.items():
            array[:] = getattr(batch, name)


def _bind(binding: ort.IOBinding, name: str, array: NDArray[Any], output: bool = False) -> None:
    bind = binding.bind_output if output else binding.bind_input
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        raise explained(error) from error


def session_options(threads: int | None) -> ort.SessionOptions:
    """For ``threads`` of the CPU, default all cores this process may use."""
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


def run_decoder(
    session: ort.InferenceSession, tokens: Int, explain: Callable[[Exception], Exception]
) -> NDArray[np.uint8]:
    """Images [B,H,W,3] of ``tokens`` [B,N]; what ONNX Runtime raises goes through ``explain``."""
    try:
        images: NDArray[np.uint8] = session.run(["images"], {"tokens": np.ascontiguousarray(tokens)})[0]
    except Exception as error:
        raise explain(error) from error
    return images


def explained(error: Exception) -> Exception:
    """ONNX Runtime's own error types as Python's, where a caller can do something about them."""
    text = str(error)
    return MemoryError(text) if any(told in text for told in NO_MEMORY) else error


def load(bundle: Bundle, threads: int | None = None, graph: str | None = None) -> OrtBackend:
    """The CPU backend of ``bundle``, on another step graph than the best one if ``graph`` names it."""
    return OrtBackend(bundle, threads, graph)
