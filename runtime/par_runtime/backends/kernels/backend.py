"""A backend that runs engines of our own kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends import cuda
from par_runtime.backends.base import Decoder
from par_runtime.backends.engines import Capture, Engine
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels.plan import KernelProgram
from par_runtime.backends.kernels.shared import Shared
from par_runtime.backends.kernels.upload import OnBytes
from par_runtime.backends.ort import needing
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.forks import no_fork
from par_runtime.late import importing
from par_runtime.loaded import LoadedFiles

OpensDecoder: TypeAlias = Callable[[LoadedFiles], Decoder]


def load(
    bundle: Bundle,
    engine: Engine,
    device: cuda.Device,
    capture: Capture = "image",
    on_load: OnBytes | None = None,
    decoder: OpensDecoder | None = None,
) -> GpuBackend:
    """``engine`` on ``device``, which the backend closes, as a failure here does.

    ``on_load``: called with the bytes of weights that are read, and of how many. ``decoder``: opens what decodes clips
    (default: ONNX Runtime). Raises EngineError, BundleError,
    CudaError; OutOfMemory where the weights do not fit.
    """
    kernels = engine.kernels
    assert kernels is not None
    with ExitStack() as undo:
        undo.callback(device.close)
        device.activate()
        stream = device.stream()
        undo.callback(stream.free)
        with closing(LoadedFiles(bundle)) as files:  # that of the manifest, though the file may be replaced meanwhile
            shared = undo.enter_context(Shared(engine, kernels, files, device, stream, on_load))
        programs = {
            name: KernelProgram(bundle, engine, name, program, shared) for name, program in kernels.programs.items()
        }
        clips = None
        if bundle.video and bundle.image_size and not engine.decodes:
            clips = ClipDecoder(bundle, decoder or with_onnx_runtime)
        backend = GpuBackend(
            bundle,
            engine,
            device,
            stream,
            programs,
            runtime=engine.runtime,
            version=engine.version,
            capture=capture,
            decoder=clips,
        )
        undo.pop_all()
        return backend


def with_onnx_runtime(files: LoadedFiles) -> Decoder:
    """A decoder of clips on ONNX Runtime's CPU. Raises ModuleNotFoundError where that is not installed."""
    with importing("par_runtime.backends.ort.decoding", "par_runtime.backends.ort.sessions"):
        from par_runtime.backends.ort.decoding import open_ort_decoder
        from par_runtime.backends.ort.sessions import decoder_options

    return open_ort_decoder(files, decoder_options(None))


class ClipDecoder:
    """What decodes clips where kernels make the tokens: the CPU, since there are no kernels of ours for it.

    ``opened`` opens the decoder, which reads its weights at its first use, from the files as they are now.
    """

    def __init__(self, bundle: Bundle, opened: OpensDecoder) -> None:
        self._files, self._opened = LoadedFiles(bundle), opened
        self._decoder: Decoder | None = None
        self.name, self.computes = "onnxruntime-cpu", "fp32"
        with suppress(ModuleNotFoundError):  # tokens can be made without it
            self._decoder = opened(self._files)
            self.name, self.computes = self._decoder.name, self._decoder.computes

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """``Decoder.run``. Raises RequestError where ONNX Runtime is needed and not installed."""
        if self._decoder is None:
            with needing("decoding a clip"), no_fork():
                self._decoder = self._opened(self._files)
        return self._decoder.run(tokens)

    def close(self) -> None:
        """Free it."""
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(self._files.close)
            if self._decoder is not None:
                parts.callback(self._decoder.close)
