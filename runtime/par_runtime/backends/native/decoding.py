"""Decoding on a CPU: by ``decoder.c`` where it can, else by ONNX Runtime; and the reasons why it cannot."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.backends.base import Decoder, NoDecoder, closed_error
from par_runtime.backends.native.clips import ClipOperations, most_latent
from par_runtime.backends.native.compiled import KernelError, compiled_file, once, open_compiled
from par_runtime.backends.native.decoder import AMX, Buffers, Decode, Op, Operations, Packing, Pointers, bf16_form
from par_runtime.backends.native.pool import Pool
from par_runtime.backends.native.tensors import Tensors
from par_runtime.bundle import Bundle
from par_runtime.checked import shown_path
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.forks import Calls, tell_of_forks
from par_runtime.late import importing
from par_runtime.loaded import LoadedFiles, check_memory
from par_runtime.system import available_cores

NO_BF16 = "the C decoder has neither AMX nor AMD's dot products in bf16: 'parvis doctor' says what it uses"
OLDER = "the manifest has no table of the decoder's weights; export the bundle again"

log = logging.getLogger(__name__)


def decoder_file() -> Path | None:
    """The compiled ``decoder.c`` beside this file; None where the installation built none."""
    return compiled_file("_decoder")


def open_decoder_library(file: Path | None) -> ctypes.CDLL:
    """Load ``file``, check that its structures are those of ``decoder.py``, and declare its functions.

    Raises KernelError.
    """
    sizes = [ctypes.sizeof(Op), Op.beta.offset, ctypes.sizeof(Decode), Decode.scratch_floats.offset]
    return open_compiled(file, _declare, "parvis_decoder_", sizes)


def _declare(lib: ctypes.CDLL) -> None:
    """Declare the functions of ``decoder.c``. Raises AttributeError where one is missing."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    lib.parvis_decoder_struct_sizes.argtypes = (pointer,)
    lib.parvis_decoder_instructions.restype = ctypes.c_char_p
    lib.parvis_decoder_sizes.argtypes = (ctypes.POINTER(Op), *[integer] * 6, pointer)
    lib.parvis_decoder_pack.argtypes = (pointer, pointer, *[integer] * 6, pointer)
    lib.parvis_decoder_transform.argtypes = (pointer, ctypes.POINTER(Op), pointer, pointer)
    lib.parvis_decoder_winograd_panel.restype = integer
    lib.parvis_decoder_winograd_panel.argtypes = (ctypes.POINTER(Op),)
    lib.parvis_decoder_bf16.restype = ctypes.c_int
    lib.parvis_decoder_bf16.argtypes = (ctypes.c_int,)
    lib.parvis_decoder_amx_panel.restype = integer
    lib.parvis_decoder_amx_panel.argtypes = (ctypes.POINTER(Op),)
    lib.parvis_decoder_pack_amx.argtypes = (pointer, ctypes.POINTER(Op), pointer, pointer)
    lib.parvis_decoder_pool_open.restype = lib.parvis_decoder_pool_close.restype = None
    lib.parvis_decoder_pool_open.argtypes = (ctypes.c_int, Pointers)
    lib.parvis_decoder_pool_close.argtypes = (Pointers,)
    lib.parvis_decode.argtypes = (pointer, ctypes.POINTER(Decode))


_opened = once(open_decoder_library)


def why_not(bundle: Bundle) -> str | None:
    """Why the C decoder cannot decode the tokens of ``bundle`` on this machine, or None where it can."""
    lib = _opened(decoder_file())
    if isinstance(lib, KernelError):
        return str(lib)
    return None if bundle.decoder_weights else OLDER


def why_not_bf16(bundle: Bundle, least_exact: bool = False) -> str | None:
    """Why the decoder of ``bundle`` does not compute in bf16 on this machine, or None where it does.

    ``least_exact``: as :func:`bf16_form` has it; without it Linux is asked for AMX.
    """
    if bundle.image_size is None:
        return "the bundle ends at tokens"
    why = why_not(bundle)
    if why is not None:
        return f"ONNX Runtime decodes: {why}"
    return None if _bf16_form(least_exact) else no_bf16()


def bf16_form_of(bundle: Bundle) -> str:
    """How the decoder of ``bundle`` can compute in bf16 on this machine, as :func:`bf16_form` has it; "" not at all.

    Linux is asked for AMX.
    """
    return "" if bundle.image_size is None or why_not(bundle) is not None else _bf16_form()


def _bf16_form(least_exact: bool = False) -> str:
    lib = _opened(decoder_file())
    assert not isinstance(lib, KernelError), lib
    return bf16_form(lib, least_exact)


def no_bf16() -> str:
    """Why the C decoder computes nothing in bf16 on this machine."""
    allowed = os.environ.get("PARVIS_NATIVE")
    return f"{NO_BF16} (PARVIS_NATIVE is set to {allowed[:40]!r})" if allowed else NO_BF16


def open_decoder(
    files: LoadedFiles, threads: int | None = None, precision: str = "fp32", least_exact: bool = False
) -> Decoder:
    """A decoder of the bundle of ``files``: in C, or ONNX Runtime where :func:`why_not` has a reason; of one that ends
    at tokens :class:`NoDecoder`, which needs neither.

    ``precision``: of ``dtypes.DECODER_PRECISIONS``; "bf16" is fp32 where :func:`why_not_bf16` has a reason, and
    ``least_exact`` as :func:`bf16_form` has it. Each reads its weights at its first use.
    """
    if files.bundle.image_size is None:
        return NoDecoder(files.bundle)
    why = why_not(files.bundle)
    exact = why_not_bf16(files.bundle, least_exact) if precision == "bf16" else None
    if exact is not None:
        log.info("%s: decoding in fp32, not in %s: %s", shown_path(files.bundle.path), precision, exact)
    if why is None:
        return NativeDecoder(files, threads, precision, least_exact)
    log.debug("%s: no C decoder: %s", shown_path(files.bundle.path), why)
    with importing("par_runtime.backends.ort.decoding", "par_runtime.backends.ort.sessions"):
        from par_runtime.backends.ort.decoding import open_ort_decoder
        from par_runtime.backends.ort.sessions import decoder_options

    return open_ort_decoder(files, decoder_options(threads))


class NativeDecoder:
    """The decoder in C, of images or clips. Several threads may use it; one at a time decodes.

    A forked process may go on with its copy.
    """

    def __init__(
        self, files: LoadedFiles, threads: int | None = None, precision: str = "fp32", least_exact: bool = False
    ) -> None:
        """``threads`` of the CPU, default all cores; ``precision`` and ``least_exact``: as :func:`open_decoder` says.

        Raises BundleError where :func:`why_not` has a reason.
        """
        lib = _opened(decoder_file())
        assert not isinstance(lib, KernelError), lib
        self._bf16 = bf16_form(lib, least_exact) if precision == "bf16" else ""
        self.computes = "bf16" if self._bf16 else "fp32"
        variant = [lib.parvis_decoder_instructions().decode(), *[AMX] * (self._bf16 == AMX)]
        variant += ["bf16"] * bool(self._bf16)
        self.name = f"native-cpu {__version__} ({', '.join(variant)})"
        self._lib, self._files, self._threads = lib, files, threads or available_cores()
        self._operations: Operations | None = None
        self._buffers: Buffers | None = None
        self._pool: Pool | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._calls = Calls()
        tell_of_forks(self)

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """``Decoder.run``."""
        with self._lock, self._calls:
            return self._run(tokens)

    def _run(self, tokens: Int) -> NDArray[np.uint8]:
        bundle = self._files.bundle
        if self._closed:
            raise closed_error(bundle)
        self._files.check()
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= bundle.vocab_size:
            raise RequestError(f"tokens to decode: expected ids 0..{bundle.vocab_size - 1} of at least one image")
        if self._operations is None:
            self._load()
        assert self._operations is not None
        assert self._pool is not None
        assert bundle.image_size is not None
        size = bundle.frame_tokens  # of clips, tokens may be those of the first latent frames
        clips, latent = len(tokens), tokens.shape[1] // size
        pixels = bundle.image_size[0] * bundle.image_size[1]
        have = self._buffers
        if have is None or have.images < clips:
            self._buffers = None  # the old ones are freed first, so that both are never held at once
            at_once = most_latent(bundle.latent_frames, pixels, bundle.time_downsampling, clips)
            have = self._buffers = Buffers(self._lib, self._operations, clips, self._threads, at_once)
        at_once = have.latent  # of fewer clips more would do, in other buffers
        raster = np.empty(tokens.shape, np.int64)
        raster[:, bundle.order[: tokens.shape[1]]] = tokens
        frames = np.empty((clips, bundle.frames_of(latent), *bundle.image_size, 3), np.uint8)
        for start in range(0, latent, at_once):
            end = min(start + at_once, latent)
            of_call = np.ascontiguousarray(raster[:, start * size : end * size])
            shown = slice(bundle.frames_of(start), bundle.frames_of(end))
            made = np.empty_like(frames[:, shown])
            call = have.call
            call.images, call.tokens, call.pixels = clips, of_call.ctypes.data, made.ctypes.data
            call.latent, call.first, call.more = end - start, start == 0, end < latent
            if self._lib.parvis_decode(self._pool.handle, ctypes.byref(call)):
                raise MemoryError(f"{self._threads} threads: no memory for a call of the decoder")
            frames[:, shown] = made
        return frames if bundle.video else frames[:, 0]

    def _load(self) -> None:
        """Start the threads, and read the weights. Raises BundleError, MemoryError."""
        bundle, table = self._files.bundle, self._files.bundle.decoder_weights
        assert bundle.tokenizer is not None
        check_memory(bundle, sum(4 * at.length for at in table.values()))
        if self._pool is None:
            self._pool = Pool(self._lib, "parvis_decoder_", self._threads)
        kind = ClipOperations if bundle.video else Operations
        packing = Packing(self._lib, self._pool.handle, Tensors(self._files))
        self._operations = kind(packing, bundle.tokenizer, bundle.grid[1:], self._bf16)

    def close(self) -> None:
        """Free weights, buffers and threads; a second call does nothing."""
        with self._lock:
            self._closed, pool = True, self._pool
            self._pool = self._operations = self._buffers = None
            if pool is not None:
                pool.close()

    def after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it
        if self._calls.lost_in_fork():
            self._buffers = None  # of its call, which never ends here

    def __del__(self) -> None:
        if (pool := getattr(self, "_pool", None)) is not None:
            pool.close()  # before the memory of its calls is freed
