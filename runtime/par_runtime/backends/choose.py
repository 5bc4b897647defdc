"""Which backend runs a bundle: an engine that fits this GPU, ONNX Runtime on CUDA where asked for, else the CPU."""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import TYPE_CHECKING

from par_runtime.arguments import given
from par_runtime.backends.commands import build_command
from par_runtime.backends.engines import KERNELS, Engine, best, has_engines, joined, list_engines, why_unfit
from par_runtime.backends.ort import needing
from par_runtime.backends.program import VERSION
from par_runtime.backends.trt import module as trt_module
from par_runtime.bundle import Bundle, FileCheck
from par_runtime.checked import shown_path
from par_runtime.dtypes import Rounding
from par_runtime.errors import CudaError, EngineError, RequestError, TensorRTMissingError
from par_runtime.late import importing

if TYPE_CHECKING:
    from par_runtime.backends.base import Backend
    from par_runtime.backends.cuda import Device
    from par_runtime.backends.engines import Capture
    from par_runtime.backends.kernels.upload import OnBytes
    from par_runtime.backends.trt.module import TensorRT

EXPECTED = (
    "expected auto, cpu, cuda, cuda:0 (an engine on that GPU), or cpu-ort, cuda-ort, cuda-ort:0 (ONNX Runtime, even "
    "where another backend could run)"
)
CPUS = ("cpu", "cpu-ort")
DEVICE = re.compile(r"(cuda|cuda-ort)(?::(\d{1,9}))?")

log = logging.getLogger(__name__)


def check_device(device: object) -> None:
    """Raise RequestError unless ``device`` is a name that :func:`choose` knows."""
    if not isinstance(device, str) or not (device in ("auto", *CPUS) or DEVICE.fullmatch(device)):
        raise RequestError(f"device {given(device)}: {EXPECTED}")


def choose(
    bundle: Bundle,
    device: str = "auto",
    *,
    threads: int | None = None,
    verify: FileCheck = "auto",
    capture: Capture = "image",
    on_load: OnBytes | None = None,
    arithmetic: str = "auto",
    cache: str = "auto",
    decoder_precision: str = "auto",
) -> tuple[Backend, str]:
    """The backend for ``device``, and one line that states why it is the CPU ("" where ``device`` asks for the CPU).

    ``auto`` takes the best engine of the bundle that fits the first GPU (``engines.best``), else the CPU. ``cpu``
    takes the C kernels (``native/``) where they were built and fit the bundle, else ONNX Runtime, for the step and for
    the decoder; ``cpu-ort`` always takes ONNX Runtime. A named GPU that cannot be used is an error. ``arithmetic``,
    ``cache`` and ``decoder_precision`` are for the CPU, as ``Pipeline.load`` describes them. Raises RequestError,
    EngineError, BundleError, CudaError.
    """
    check_device(device)
    rounding = bundle.rounding(Rounding(arithmetic, cache, decoder_precision))
    if device in CPUS:
        return _cpu(bundle, threads, rounding, native=device == "cpu"), ""
    if device == "auto":
        try:
            backend, why = _engine(bundle, 0, verify, capture, on_load, rounding.decoder_precision)
        except (EngineError, CudaError) as error:
            backend, why = None, str(error)
        if backend is not None:
            return backend, ""
        try:
            return _cpu(bundle, threads, rounding), f"running on the CPU: {why}"
        except RequestError as error:
            if not has_engines(bundle):
                raise
            raise RequestError(f"no engine runs here ({why}); {error}") from error  # either can be mended
    match = DEVICE.fullmatch(device)
    assert match is not None
    index = int(match.group(2) or 0)
    if match.group(1) == "cuda-ort":
        with importing("par_runtime.backends.ort.gpu"):
            from par_runtime.backends.ort import gpu as ort_cuda
        return ort_cuda.OrtCudaBackend(bundle, index, threads), ""
    backend, why = _engine(bundle, index, verify, capture, on_load, rounding.decoder_precision)
    if backend is None:
        raise EngineError(f"device {device!r} cannot run {bundle.path}: {why}")
    return backend, ""


def _cpu(bundle: Bundle, threads: int | None, rounding: Rounding, native: bool = True) -> Backend:
    with importing(
        "par_runtime.backends.native.backend",
        "par_runtime.backends.native.decoding",
        "par_runtime.backends.native.library",
    ):
        from par_runtime.backends.native.backend import NativeBackend
        from par_runtime.backends.native.decoding import open_decoder
        from par_runtime.backends.native.library import why_not
    why = why_not(bundle) if native else "ONNX Runtime was asked for"
    if why is None:
        return NativeBackend(bundle, threads, *rounding)
    # Only where it runs: importing it takes as long as loading a small bundle.
    with needing("running on the CPU"), importing("par_runtime.backends.ort.cpu"):
        from par_runtime.backends.ort import cpu as ort
    log.debug("%s: no C step: %s", shown_path(bundle.path), why)
    decoder = partial(open_decoder, threads=threads, precision=rounding.decoder_precision) if native else None
    return ort.OrtBackend(bundle, threads, arithmetic=rounding.arithmetic, decoder=decoder)


def _engine(
    bundle: Bundle, index: int, verify: FileCheck, capture: Capture, on_load: OnBytes | None, precision: str
) -> tuple[Backend | None, str]:
    """A loaded engine on GPU ``index``, or None and the reason. ``precision``: of what decodes on the CPU beside it."""
    with importing("par_runtime.backends.cuda"):
        from par_runtime.backends import cuda
    engines, bad = list_engines(bundle)
    if not engines and not bad and not cuda.has_driver():  # an engine could not be built here either
        return None, cuda.NO_DRIVER
    if not engines:
        build = f"{build_command(bundle.path)} --target local"
        return None, joined(bad) if bad else f"{shown_path(bundle.path)} holds no engines; build them with: {build}"
    count = cuda.device_count()
    if index >= count:
        return None, cuda.why_no_device() if count == 0 else f"there is no GPU {index}, only {count}"
    with cuda.Device.open(index) as gpu:
        capability, name = gpu.capability, gpu.name
    fits: list[tuple[Engine, TensorRT | None]] = []
    reasons = list(bad)
    for runtime in dict.fromkeys(engine.runtime for engine in engines):
        trt, version = None, VERSION
        if runtime != KERNELS:
            try:
                trt = trt_module.load(runtime)
            except TensorRTMissingError as error:
                reasons.append(str(error))
                continue
            version = trt.version
        for engine in engines:
            if engine.runtime == runtime:
                why = why_unfit(engine, runtime, version, capability, name)
                if why is None:
                    fits.append((engine, trt))
                else:
                    reasons.append(why)
    for reason in reasons:
        log.debug("%s", reason)
    first: EngineError | CudaError | None = None
    while fits:
        engine, trt = best_fit = next(fit for fit in fits if fit[0] is best([each for each, _ in fits]))
        fits.remove(best_fit)
        # What the caller asks for wins.
        chosen = engine.tuned.get("capture", capture) if capture == "image" else capture
        try:
            engine.check_files(verify)  # until now only its engine.json was read
        except EngineError as error:  # it is damaged; try the next one
            reasons.append(str(error))
            continue
        try:
            return _loaded(bundle, engine, cuda.Device.open(index), trt, chosen, on_load, precision), ""
        except (EngineError, CudaError) as error:  # this driver cannot run it, or there is too little memory for it
            log.info("%s cannot be loaded: %s", shown_path(engine.path), error)
            first = first or error
    if first is not None:
        raise first
    return None, joined(reasons)


def _loaded(
    bundle: Bundle,
    engine: Engine,
    device: Device,
    trt: TensorRT | None,
    capture: Capture,
    on_load: OnBytes | None,
    precision: str,
) -> Backend:
    if trt is None:
        with importing("par_runtime.backends.kernels.backend", "par_runtime.backends.native.decoding"):
            from par_runtime.backends.kernels import backend as kernels_backend
            from par_runtime.backends.native.decoding import open_decoder
        return kernels_backend.load(
            bundle, engine, device, capture, on_load, partial(open_decoder, precision=precision)
        )
    with importing("par_runtime.backends.trt.backend"):
        from par_runtime.backends.trt import backend as trt_backend
    return trt_backend.load(bundle, engine, device, trt, capture)
