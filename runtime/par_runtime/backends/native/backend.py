"""The step network in C (``native/step.c``): what a CPU runs where weights are large, rows are few, and a compiler was there.

ONNX Runtime multiplies a few rows by a large matrix at half to two thirds of what memory delivers, and holds half-precision
weights in fp32. This backend packs each matrix once into the order in which it is read, fetches it ahead, widens half
precision in registers, and reads only the keys that a row sees. Same network, same arithmetic (fp32), same noise; tokens are
those of ``step.onnx`` up to rounding, which the self-test of every load checks. Images are decoded by ONNX Runtime.

Where it cannot run (no compiler at installation, an older CPU, a layout that it does not know) ``why_not`` says so, and
``devices.py`` takes ONNX Runtime. Letters: R rows, B images, q positions, N tokens, V codes, D' padded head size.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.backends.base import BackendInfo, Batch
from par_runtime.backends.draws import draw_all
from par_runtime.backends.ort.cpu import MOST_IMAGES, TIE
from par_runtime.backends.ort.sessions import explained, open_session, run_decoder, session_options
from par_runtime.bundle import WEIGHTS, Bundle, Stored
from par_runtime.dtypes import BYTES, Float, Int
from par_runtime.errors import BundleError
from par_runtime.system import available_cores

TYPES = {"float32": (0, 4), "float16": (1, 2), "bfloat16": (2, 2)}  #: dtype -> (its number in step.c, bytes)
PAGE_BYTES = 4096

_Pointers = ctypes.POINTER(ctypes.c_void_p)


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dim", "layers", "heads", "head", "ffn", "vocab", "slots", "type")),
        ("scale", ctypes.c_float),
        *((name, _Pointers) for name in ("wqkv", "wo", "w13", "w2", "attention_gain", "ffn_gain")),
        ("gain", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("model", ctypes.POINTER(_Model)),
        ("rows", ctypes.c_int64),
        ("query", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("write", "x", "cosine", "sine")),
        ("all_keys", _Pointers),
        ("all_values", _Pointers),
        *((n, ctypes.c_void_p) for n in ("logits", "keys", "values", "qkv", "mixed", "normed", "gates", "scratch")),
        ("scratch_floats", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled ``step.c`` beside this file; None where there is none, or this CPU has no instructions for it."""
    folder = Path(__file__).parent
    found = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"_step{s}").is_file()), None)
    if found is None:
        return None
    try:
        lib = ctypes.CDLL(str(found))
    except OSError:
        return None
    lib.parvis_instructions.restype = ctypes.c_char_p
    lib.parvis_open.restype = ctypes.c_void_p
    lib.parvis_close.argtypes = (ctypes.c_void_p,)
    lib.parvis_scratch.restype = ctypes.c_int64
    lib.parvis_scratch.argtypes = (ctypes.POINTER(_Model), ctypes.c_int64, ctypes.c_int64)
    lib.parvis_step.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Step))
    lib.parvis_pack.argtypes = (ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_int, ctypes.c_void_p)
    return lib if lib.parvis_instructions() else None


def why_not(bundle: Bundle) -> str | None:
    """Why ``bundle`` cannot run here in C, or None where it can."""
    lib = library()
    if lib is None:
        return "the C kernels were not built, or this CPU has neither AVX2 nor AVX-512"
    m, panel = bundle.model, lib.parvis_panel()
    inner = m["n_heads"] * m["head_dim_padded"]
    if any(size % panel for size in (m["dim"], inner, m["ffn_dim"], bundle.vocab_size)):
        return f"a width of the model is no multiple of {panel}"
    if not bundle.weights or bundle.weights["output"].dtype not in TYPES:
        return "the manifest has no table of weights in fp32, fp16 or bf16; export the bundle again"
    return None


class NativeBackend:
    """A bundle on the C kernels. See ``backend.Backend`` for the calls."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        lib = library()
        reason = why_not(bundle)
        if lib is None or reason is not None:
            raise BundleError(
                f"{bundle.path}: cannot run on the C kernels: {reason}; --device cpu-ort takes ONNX Runtime"
            )
        self.bundle, self._lib = bundle, lib
        self.info = BackendInfo(
            runtime="native-cpu",
            version=f"{__version__} ({lib.parvis_instructions().decode()})",
            device="cpu",
            computes="fp32",
            weight_bytes=BYTES.get(bundle.precision, 4.0),
            cache_bytes=4.0,
        )
        self.max_images, self.tie = MOST_IMAGES, TIE
        self._threads = threads or available_cores()
        self._decoder: ort.InferenceSession | None = None
        self._slots = -(-bundle.n_tokens // lib.parvis_panel()) * lib.parvis_panel()
        self._weights = _Weights(bundle, lib, self._slots)
        self._pool: int | None = lib.parvis_open(self._threads)
        self._rows = 0  # of the buffers in _calls
        self._holds_keys = False
        # Keys of all layers, then values, each at least R*H*slots*D' long; one allocation, for which numpy asks huge pages.
        self._cache: Float = np.zeros((2 * bundle.model["n_layers"], 0), np.float32)
        self._calls: dict[int, _Call] = {}  # by q, of the current number of rows

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        return _drawn(self._guided(batch, ids, write), uniform, batch)

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        return self._guided(batch, ids, write).copy()

    def release(self, cache_rows: Int | None = None) -> None:
        if cache_rows is None:
            self._holds_keys = False

    def _reserve(self, batch: Batch) -> None:
        """A cache for the rows of ``batch``; keys that are still needed stay."""
        m = self.bundle.model
        length = batch.cache_rows * m["n_heads"] * self._slots * m["head_dim_padded"]
        if batch.rows != self._rows:
            self._calls.clear()
            self._rows = batch.rows
        old = self._cache
        if old.shape[1] < length:
            self._calls.clear()
            if not self._holds_keys:  # given back first, so that the old and the new are never held together
                old = self._cache = old[:, :0].copy()
            # full(), not zeros(): it writes every page now instead of faulting inside the first calls.
            self._cache = np.full((2 * m["n_layers"], length), 0, np.float32)
            self._cache[:, : old.shape[1]] = old
        self._holds_keys = True

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        if self._decoder is None:
            self._decoder = open_session(self.bundle, "decoder", session_options(self._threads))
        return run_decoder(self._decoder, tokens, explained)

    def close(self) -> None:
        if self._pool is not None:
            self._lib.parvis_close(self._pool)
        self._pool = None
        self._calls.clear()
        self._cache = self._cache[:, :0].copy()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()

    def _guided(self, batch: Batch, ids: Int, write: Int) -> Float:
        """Logits [B,q,V] of one call, guidance applied; a view of a buffer that the next call of the same q overwrites."""
        self._reserve(batch)
        rows = self._run(batch, ids, write)
        cond = rows[: batch.images]
        if batch.rows == batch.images:
            return cond
        guided = self._calls[ids.shape[1]].guided[: batch.images]  # no fresh memory of this size in every call
        for b, other in enumerate(batch.uncond_row):
            np.subtract(cond[b], rows[other], out=guided[b])
            guided[b] *= batch.guidance[b]
            guided[b] += rows[other]
        return guided

    def _run(self, batch: Batch, ids: Int, write: Int) -> Float:
        """Logits [R,q,V] of every row; a buffer that the next call of the same q overwrites."""
        query = ids.shape[1]
        call = self._calls.get(query)
        if call is None:
            call = self._calls[query] = _Call(self, len(ids), query)
        call.write[:] = write
        self._weights.embed(ids, call.x)
        positions = write[:, None] + np.arange(query)  # [R,q]
        call.cosine[:] = self._weights.cosine[positions]
        call.sine[:] = self._weights.sine[positions]
        self._lib.parvis_step(self._pool, ctypes.byref(call.step))
        return call.logits


class _Call:
    """The buffers of one number of rows and positions, and what step.c is told of them."""

    def __init__(self, backend: NativeBackend, rows: int, query: int) -> None:
        m, lib = backend.bundle.model, backend._lib
        count, half = rows * query, m["head_dim_padded"] // 2
        inner, layers = m["n_heads"] * m["head_dim_padded"], m["n_layers"]
        self.write = np.zeros(rows, np.int64)
        self.x = np.zeros((rows, query, m["dim"]), np.float32)
        self.cosine = np.zeros((rows, query, half), np.float32)
        self.sine = np.zeros((rows, query, half), np.float32)
        self.logits = np.zeros((rows, query, backend.bundle.vocab_size), np.float32)
        self.guided = np.zeros_like(self.logits)
        model = backend._weights.model
        each = lib.parvis_scratch(ctypes.byref(model), rows, query)
        sizes = (count * 3 * inner, count * inner, count * m["dim"], count * m["ffn_dim"], each * backend._threads)
        self._held = [np.zeros(size, np.float32) for size in sizes]
        caches = [_pointers(list(backend._cache[:layers])), _pointers(list(backend._cache[layers:]))]
        own = [array.ctypes.data for array in (self.write, self.x, self.cosine, self.sine)]
        held = [array.ctypes.data for array in self._held]
        self.step = _Step(ctypes.pointer(model), rows, query, *own, *caches, self.logits.ctypes.data, 0, 0, *held, each)


class _Weights:
    """The bundle's matrices in panels, in one allocation, and its tables."""

    def __init__(self, bundle: Bundle, lib: ctypes.CDLL, slots: int) -> None:
        m, table = bundle.model, bundle.weights
        kind, size = TYPES[table["output"].dtype]
        layers = range(m["n_layers"])
        names = [f"layers.{i}.{matrix}" for matrix in ("wqkv", "wo", "w13", "w2") for i in layers] + ["output"]
        odd = [name for name in names if table[name].dtype != table["output"].dtype]
        if odd:
            raise BundleError(
                f"{bundle.path}: {odd[0]} is stored in another precision than the others; export it again"
            )
        with (bundle.path / WEIGHTS).open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        file = np.frombuffer(mapped, np.uint8)
        starts, total = {}, 0
        for name in names:
            starts[name] = total
            total += -(-table[name].length // PAGE_BYTES) * PAGE_BYTES
        self._packed = np.empty(total, np.uint8)  # numpy asks the system for huge pages
        at = {name: self._packed.ctypes.data + start for name, start in starts.items()}
        for name in names:
            stored = table[name]
            source = file.ctypes.data + stored.offset
            lib.parvis_pack(source, *stored.shape, size, int(name.endswith("w13")), at[name])
            _give_back(mapped, stored)
        gains = {
            n: _widened(file, table[n]) for n in table if n.endswith(("attention_norm", "ffn_norm")) or n == "norm"
        }
        self._gains = gains
        self._embed, self._embed_dtype = _raw(file, table["embed"]).copy(), table["embed"].dtype
        self.cosine, self.sine = (_widened(file, table[name]) for name in ("cos", "sin"))
        del file  # and with it the mapping

        def each(matrix: str) -> Any:
            return (ctypes.c_void_p * len(layers))(*(at[f"layers.{i}.{matrix}"] for i in layers))

        self.model = _Model(
            m["dim"],
            m["n_layers"],
            m["n_heads"],
            m["head_dim_padded"],
            m["ffn_dim"],
            bundle.vocab_size,
            slots,
            kind,
            m["head_dim"] ** -0.5,
            *(each(matrix) for matrix in ("wqkv", "wo", "w13", "w2")),
            *(_pointers([gains[f"layers.{i}.{norm}"] for i in layers]) for norm in ("attention_norm", "ffn_norm")),
            gains["norm"].ctypes.data,
            at["output"],
        )

    def embed(self, ids: Int, out: Float) -> None:
        """The rows of the embedding table for ``ids`` [R,q] into ``out`` [R,q,d]."""
        out[:] = _wide(self._embed[ids], self._embed_dtype)


def _give_back(mapped: mmap.mmap, stored: Stored) -> None:
    """A tensor was read: its pages, which count as this process's memory while they are mapped, are not needed again."""
    if hasattr(mapped, "madvise"):
        start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, stored.offset + stored.length - start)


def _raw(file: NDArray[np.uint8], stored: Stored) -> NDArray[Any]:
    """A tensor of the weights file as it is stored; bf16 as uint16."""
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[stored.dtype]
    return file[stored.offset : stored.offset + stored.length].view(kind).reshape(stored.shape)


def _wide(array: NDArray[Any], dtype: str) -> Float:
    """Stored numbers as fp32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(array, np.float32)


def _widened(file: NDArray[np.uint8], stored: Stored) -> Float:
    """A tensor of the weights file in fp32; a copy."""
    return np.array(_wide(_raw(file, stored), stored.dtype))


def _pointers(arrays: list[Float]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _drawn(logits: Float, uniform: Float, batch: Batch) -> Int:
    """Tokens [B,q] of guided ``logits`` [B,q,V]: the graphs' sampling tail."""
    images, query, vocab = logits.shape
    temperature, top_p, top_k = (np.repeat(v, query) for v in (batch.temperature, batch.top_p, batch.top_k))
    drawn = draw_all(logits.reshape(-1, vocab), uniform.reshape(-1), temperature, top_k, top_p)  # type: ignore[arg-type]
    return drawn.reshape(images, query)
