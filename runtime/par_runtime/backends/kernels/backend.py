"""A backend that runs engines of our own kernels."""

from __future__ import annotations

from contextlib import ExitStack, closing

from par_runtime.backends import cuda
from par_runtime.backends.engines import Capture, Engine
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels.plan import KernelProgram
from par_runtime.backends.kernels.shared import Shared
from par_runtime.backends.kernels.upload import OnBytes
from par_runtime.bundle import Bundle
from par_runtime.loaded import LoadedFiles


def load(
    bundle: Bundle, engine: Engine, device: cuda.Device, capture: Capture = "image", on_load: OnBytes | None = None
) -> GpuBackend:
    """``engine`` on ``device``, which the backend closes, as a failure here does.

    ``on_load``: called with the bytes of weights that are read, and of how many. Raises EngineError, BundleError,
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
        backend = GpuBackend(
            bundle,
            engine,
            device,
            stream,
            programs,
            runtime=engine.runtime,
            version=engine.version,
            capture=capture,
        )
        undo.pop_all()
        return backend
