"""A loaded plan: checked against the bundle, with its execution contexts on memory that this package allocates.

``base.tensors`` describes the tensors that a plan must have; a plan that differs is refused when it is loaded, not at
the first launch. There is one context per profile. They share one block of scratch memory, because they run one after
the other.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

from par_runtime.backends import cuda
from par_runtime.backends.base import tensors
from par_runtime.backends.engines import Engine, Plan
from par_runtime.backends.trt.module import TensorRT
from par_runtime.bundle import Bundle
from par_runtime.checked import open_regular
from par_runtime.errors import EngineError
from par_runtime.stopping import later
from par_runtime.system import naming, write_beside

RUNTIME_CACHE = "runtime.cache"  #: kernels that TensorRT-RTX compiled for this GPU

_BYTES = {
    "INT64": 8,
    "INT32": 4,
    "FLOAT": 4,
    "HALF": 2,
    "BF16": 2,
    "UINT8": 1,
}  #: of one number, by TensorRT's name of its dtype


class LoadedPlan:
    """A deserialized plan and its contexts."""

    def __init__(
        self, bundle: Bundle, engine: Engine, name: str, plan: Plan, trt: TensorRT, runtime: Any, log: Any
    ) -> None:
        self.name, self.plan, self.engine, self._trt, self._log = name, plan, engine, trt, log
        self._runtime = runtime  # it must live as long as what it deserialized
        path = engine.path / plan.file
        self._folder = engine.path.resolve()  # the runtime cache is written later, maybe from another directory
        with naming(path), open_regular(path) as file:  # mapped, so that gigabytes are not in memory twice
            self._tensorrt = runtime.deserialize_cuda_engine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if self._tensorrt is None:
            raise EngineError(
                f"{path}: {trt.name} {trt.version} cannot load it ({log.last_error()}); rebuild with: {engine.rebuild}"
            )
        self.tensors = {self._tensorrt.get_tensor_name(i): i for i in range(self._tensorrt.num_io_tensors)}
        self._check(bundle)
        self._config: Any = None
        self._rtx_cache: Any = None
        self._contexts: dict[int, PlanContext] = {}
        strategy = trt.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if trt.rtx:
            self._config = self._tensorrt.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(strategy)
            kinds = getattr(trt.module, "DynamicShapesKernelSpecializationStrategy", None)
            if kinds is not None:  # otherwise a capture could keep the general kernels, which run until others are made
                self._config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
            self._rtx_cache = self._config.create_runtime_cache()
            stored = engine.path / f"{name}.{RUNTIME_CACHE}"
            if stored.is_file():  # refused where driver or GPU differ; then kernels are compiled again
                with naming(stored):
                    content = stored.read_bytes()
                self._rtx_cache.deserialize(content)
            self._config.set_runtime_cache(self._rtx_cache)
        self._strategy = strategy

    def scratch_bytes(self, profile: int) -> int:
        """Scratch memory that a context of this profile needs."""
        return int(self._tensorrt.get_device_memory_size_for_profile_v2(profile))

    def element_bytes(self, tensor: str) -> int:
        """Bytes of one number of ``tensor``."""
        return _BYTES[str(self._tensorrt.get_tensor_dtype(tensor)).rpartition(".")[2]]

    def profile_shape(self, tensor: str, profile: int) -> tuple[int, ...]:
        """The shape of an input at ``profile``, whose minimum and maximum are equal."""
        shapes = self._tensorrt.get_tensor_profile_shape(tensor, profile)
        return tuple(shapes[-1])

    def context(self, profile: int, scratch: int, scratch_bytes: int, stream: cuda.Stream) -> PlanContext:
        """The context of ``profile``, on scratch memory at ``scratch``; shapes are set, addresses are not."""
        context = self._contexts.get(profile)
        if context is None:
            with later():  # it logs, see backend.py
                context = self._contexts[profile] = self._new_context(profile, stream)
        context.raw.set_device_memory(scratch, scratch_bytes)
        return context

    def _new_context(self, profile: int, stream: cuda.Stream) -> PlanContext:
        made = self._tensorrt.create_execution_context(self._config if self._trt.rtx else self._strategy)
        if made is None or not made.set_optimization_profile_async(profile, stream.handle):
            raise EngineError(
                f"{self.engine.path}: no context for profile {profile} of {self.name}: {self._log.last_error()}"
            )
        for tensor in self.tensors:
            if self._is_input(tensor) and not made.set_input_shape(tensor, self.profile_shape(tensor, profile)):
                raise EngineError(
                    f"{self.engine.path}: {self.name} refuses its own shape of {tensor!r}: {self._log.last_error()}"
                )
        return PlanContext(self.engine, made, self._log)

    def launched(self) -> None:
        """Keep what TensorRT-RTX compiled, so that the next load does not compile it again."""
        if self._rtx_cache is None:
            return
        path = self._folder / f"{self.name}.{RUNTIME_CACHE}"
        if not self._folder.is_dir():  # removed or renamed since
            return
        blob = bytes(self._rtx_cache.serialize())
        if path.is_file() and path.stat().st_size == len(blob):
            return
        with suppress(OSError):  # a bundle on a read-only disk: the kernels are compiled at each load
            write_beside(path, lambda part: part.write_bytes(blob))

    def close(self) -> None:
        """Free the plan and its contexts."""
        self._contexts.clear()
        self._tensorrt = None

    def _is_input(self, tensor: str) -> bool:
        return bool(self._tensorrt.get_tensor_mode(tensor) == self._trt.module.TensorIOMode.INPUT)

    def _check(self, bundle: Bundle) -> None:
        """Raise EngineError where tensors, profiles or aliases are not those of the bundle and ``engine.json``."""
        entry, path = self.engine, self.engine.path / self.plan.file
        again = f"rebuild with: {entry.rebuild}"
        wanted = tensors(bundle, self.plan.query)
        missing = sorted(wanted.keys() - self.tensors.keys())
        extra = sorted(self.tensors.keys() - wanted.keys())
        if missing or extra:
            raise EngineError(
                f"{path}: tensors {', '.join(missing + extra)} {'are missing' if missing else 'are unknown'}; {again}"
            )
        profiles = self._tensorrt.num_optimization_profiles
        if profiles != len(entry.images):
            raise EngineError(
                f"{path}: has {profiles} profiles, engine.json lists {len(entry.images)} batch sizes; {again}"
            )
        for name, tail in wanted.items():
            if not self._is_input(name):
                continue
            for profile, images in enumerate(entry.images):
                rows = 2 * images if tail[0] == "R" else images
                if self.profile_shape(name, profile) != (rows, *tail[1:]):
                    raise EngineError(
                        f"{path}: {name!r} has shape {self.profile_shape(name, profile)} at {images} images, expected "
                        f"{(rows, *tail[1:])}; {again}"
                    )
        if self.plan.query == 0:
            return
        if not hasattr(self._tensorrt, "get_aliased_input_tensor"):
            raise EngineError(
                f"{self._trt.name} {self._trt.version} does not report aliased tensors; install a newer version"
            )
        for past, present in zip(bundle.cache.inputs, bundle.cache.outputs, strict=True):
            aliased = self._tensorrt.get_aliased_input_tensor(present)
            if aliased != past:
                raise EngineError(
                    f"{path}: cache output {present!r} is aliased with {aliased!r}, expected {past!r}: it would be "
                    f"copied or lost; {again}"
                )


class PlanContext:
    """An execution context; see ``gpu.loaded.Context``."""

    def __init__(self, engine: Engine, raw: Any, log: Any) -> None:
        self.engine, self.raw, self._log = engine, raw, log

    def bind(self, name: str, address: int) -> None:
        """Later launches find the tensor ``name`` at ``address``. Raises EngineError."""
        if not self.raw.set_tensor_address(name, address):
            raise EngineError(
                f"{self.engine.path}: refuses the address {address:#x} of {name!r}; rebuild with: {self.engine.rebuild}"
            )

    def enqueue(self, stream: cuda.Stream, what: str) -> None:
        """Launch it. Raises EngineError, which names ``what``."""
        if not self.raw.execute_async_v3(stream.handle):
            raise EngineError(f"{self.engine.path}: {what} failed: {self._log.last_error()}")


def make_log(trt: TensorRT) -> Any:
    """A TensorRT logger that keeps the last error, for the messages of this package."""

    class Log(trt.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.module.ILogger.__init__(self)
            self._last = ""

        def log(self, severity: Any, message: str) -> None:
            if str(severity).rpartition(".")[2] in ("ERROR", "INTERNAL_ERROR"):
                self._last = message

        def last_error(self) -> str:
            """The last error that TensorRT logged; each is returned once."""
            last, self._last = self._last, ""
            return " ".join(last.split())[:400] or "it gave no reason"

    return Log()
