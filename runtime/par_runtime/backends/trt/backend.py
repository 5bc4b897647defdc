"""A backend that runs TensorRT's plans."""

from __future__ import annotations

from contextlib import ExitStack

from par_runtime.backends import cuda
from par_runtime.backends.engines import Capture, Engine
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.trt.module import TensorRT
from par_runtime.backends.trt.plan import LoadedPlan, make_log
from par_runtime.bundle import Bundle
from par_runtime.stopping import later


def load(bundle: Bundle, engine: Engine, device: cuda.Device, trt: TensorRT, capture: Capture = "image") -> GpuBackend:
    """``engine`` on ``device``, which the backend closes, as a failure here does. Raises EngineError, CudaError."""
    with ExitStack() as undo:
        undo.callback(device.close)
        device.activate()
        log = make_log(trt)
        plans = dict(engine.plans) | ({"decoder": engine.decoder} if engine.decoder else {})
        with later():  # TensorRT logs by calling Python, and loses an exception there, or ends the process
            runtime = trt.module.Runtime(log)
            programs = {name: LoadedPlan(bundle, engine, name, plan, trt, runtime, log) for name, plan in plans.items()}
        stream = device.stream()
        undo.callback(stream.free)
        backend = GpuBackend(
            bundle, engine, device, stream, programs, runtime=trt.name, version=trt.version, capture=capture
        )
        undo.pop_all()
        return backend
