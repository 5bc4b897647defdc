"""A stand-in for TensorRT's runtime: checks what TensorRT would only crash on, computes with ONNX Runtime.

A "plan" is a line of JSON that names the bundle. An enqueue takes a snapshot of addresses and shapes, as
``enqueueV3`` does, and runs the bundle's own step graph or decoder when the stream gets there.
"""

from __future__ import annotations

import enum
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from double.driver import Driver, ViolationError
from par_runtime.backends.base import tensors
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA, ENGINES
from par_runtime.backends.ort.sessions import OPSET24_SINCE, QUANTISED_ACCURACY
from par_runtime.backends.trt.module import TensorRT
from par_runtime.bundle import Bundle, seal
from par_runtime.system import sha256

VERSION = "1.0.double"
DTYPES = {
    **dict.fromkeys(("ids", "positions", "write", "image", "cond_row", "uncond_row", "top_k", "tokens"), "INT64"),
    **dict.fromkeys(("uniform", "guidance", "temperature", "top_p", "logits"), "FLOAT"),
    "length": "INT32",
    "images": "UINT8",
}
NUMPY = {"INT64": np.int64, "INT32": np.int32, "FLOAT": np.float32, "UINT8": np.uint8}
SCRATCH_BYTES = 4096


class DataType(enum.Enum):
    INT64 = 0
    INT32 = 1
    FLOAT = 2
    UINT8 = 3


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 1


class ILogger:
    def __init__(self) -> None:
        pass


def make(driver: Driver, name: str = "tensorrt_rtx", version: str = VERSION) -> TensorRT:
    """The stand-in as ``trt_module.load`` would return it."""
    module = SimpleNamespace(
        __version__=version,
        ILogger=ILogger,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        Runtime=lambda log: SimpleNamespace(
            deserialize_cuda_engine=lambda data: _deserialize(driver, log, bytes(data))
        ),
    )
    return TensorRT(module, name, version)


def write_engine(
    bundle: Bundle, images: tuple[int, ...] = (1, 2, 4), mode: str = "shared", *, slow: float = 0.0, **changes: Any
) -> Path:
    """An engine folder of stand-in plans for ``bundle``, each run ``slow`` seconds slower; ``changes`` are fields of
    ``engine.json``."""
    phases = {phase.name: phase.query for phase in bundle.phases}
    if mode == "shared":
        queries = {"step": (bundle.group_size, list(phases))}
    else:
        names = {"prefill": ["prefill", "sequential"], "transition": ["transition"], "group": ["group"]}
        queries = {
            name: (phases[here[0]], here)
            for name, serves in names.items()
            if (here := [p for p in serves if p in phases])
        }
    folder = bundle.path / ENGINES / f"tensorrt_rtx-{VERSION}-sm80-{mode}"
    folder.mkdir(parents=True)

    def plan(name: str, query: int, serves: list[str]) -> dict[str, Any]:
        file = folder / f"{name}.plan"
        file.write_text(json.dumps({"bundle": str(bundle.path), "query": query, "images": images, "slow": slow}))
        size = file.stat().st_size
        return {"file": file.name, "bytes": size, "sha256": sha256(file), "query": query, "phases": serves}

    document = {
        "schema": ENGINE_SCHEMA,
        "bundle": bundle.hash,
        "runtime": "tensorrt_rtx",
        "version": VERSION,
        "target": "SM80",
        "device": None,
        "precision": "fp32",
        "mode": mode,
        "images": images,
        "sampling": "dynamic",
        "plans": {name: plan(name, query, serves) for name, (query, serves) in queries.items()},
        "decoder": plan("decoder", 0, []) if bundle.image_size else None,
        "tuned": {},
        "report": {},
    }
    (folder / ENGINE_JSON).write_text(json.dumps(seal(document | changes)))
    return folder


def _deserialize(driver: Driver, log: Any, data: bytes) -> Engine | None:
    try:
        return Engine(driver, json.loads(data))
    except ValueError:
        log.log("Severity.ERROR", "deserializeCudaEngine failed: magic tag does not match")
        return None


class Engine:
    """``ICudaEngine``: the tensors and profiles of one stand-in plan."""

    def __init__(self, driver: Driver, plan: Mapping[str, Any]) -> None:
        self.driver, self.query, self.images = driver, plan["query"], plan["images"]
        self.slow = plan["slow"]
        self.bundle = Bundle.open(plan["bundle"])
        self.tensors = tensors(self.bundle, self.query)
        newest = tuple(int(part) for part in ort.__version__.split(".")[:2]) >= OPSET24_SINCE
        graph = "decoder" if self.query == 0 else "step" if newest else "step_opset23"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of copied caches, which are meant here
        options.intra_op_num_threads = 1
        options.add_session_config_entry(QUANTISED_ACCURACY, "1")  # activations stay as they are, as on a GPU
        path = str(self.bundle.path / self.bundle.graphs[graph].file)
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.images)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        outputs = ("images",) if self.query == 0 else ("tokens", "logits")
        return TensorIOMode.OUTPUT if name in outputs or name.startswith("present_") else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[DTYPES.get(name, "FLOAT")]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [self.shape(name, profile)] * 3

    def shape(self, name: str, profile: int) -> tuple[int, ...]:
        letter, *rest = self.tensors[name]
        return (self.images[profile] * (2 if letter == "R" else 1), *rest)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present_", "past_") if name.startswith("present_") else None

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH_BYTES * self.images[profile]

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(deserialize=lambda blob: True, serialize=lambda: b"compiled kernels")
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: True,
        )

    def create_execution_context(self, how: Any) -> Context:
        return Context(self)

    def run(self, memory: dict[str, np.ndarray]) -> None:
        """Compute one enqueue; outputs are written to device memory."""
        time.sleep(self.slow)
        if self.query == 0:
            memory["images"][...] = self.session.run(["images"], {"tokens": memory["tokens"]})[0]
            return
        wanted = {i.name for i in self.session.get_inputs()}
        feed = {name: array for name, array in memory.items() if name in wanted}
        feed["length"] = memory["length"].astype(np.int64)
        # The runtime must never let a row see what no call has written, nor write beyond the cache.
        slots = memory["past_k.0"].shape[2]
        if (memory["write"] < 0).any() or (memory["write"] + self.query > slots).any():
            raise ViolationError(f"cache write at {memory['write']} of {slots} slots")
        for name, array in feed.items():
            if name.startswith("past_") and not np.isfinite(array).all():
                raise ViolationError(f"{name!r} holds values that are not finite: it was never zeroed")
        names = [o.name for o in self.session.get_outputs()]
        try:
            got = dict(zip(names, self.session.run(names, feed), strict=True))
        except Exception as error:  # on a GPU: an illegal address, or garbage
            raise ViolationError(f"the step cannot be computed from what it was given: {error}") from error
        if not (memory["image"] < len(memory["cond_row"])).all():
            raise ViolationError(f"images {memory['image']} of {len(memory['cond_row'])}: read out of bounds")
        # The step graph writes only the rows that make logits; an engine gives every row its image's tokens.
        memory["tokens"][...] = got["tokens"][memory["cond_row"]][memory["image"]]
        memory["logits"][...] = got["logits"]
        for name in names:
            if name.startswith("present_"):
                memory[name][...] = got[name]


class Context:
    """``IExecutionContext``: refuses what TensorRT refuses, and what it would answer with undefined behaviour."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.enqueued = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None or tuple(shape) != self.engine.shape(name, self.profile):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors or address % 256:
            return False
        self.addresses[name] = address
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.scratch = (pointer, size)

    def execute_async_v3(self, stream: int) -> bool:
        engine, driver = self.engine, self.engine.driver
        if self.profile is None or self.scratch is None:
            raise ViolationError("enqueue without a profile, or without device memory")
        if self.scratch[1] < engine.get_device_memory_size_for_profile_v2(self.profile):
            raise ViolationError(f"device memory of {self.scratch[1]} bytes is too small for profile {self.profile}")
        driver.span(*self.scratch, "device memory")
        if driver.capturing(stream) and not self.enqueued:
            raise ViolationError("first enqueue of a context inside a capture")
        memory = {}
        for name in engine.tensors:
            if name not in self.addresses:
                raise ViolationError(f"no address for {name!r}")
            if engine.get_tensor_mode(name) == TensorIOMode.INPUT and name not in self.shapes:
                raise ViolationError(f"no shape for {name!r}")
            dtype = np.dtype(NUMPY[engine.get_tensor_dtype(name).name])
            shape = engine.shape(name, self.profile)
            raw = driver.span(self.addresses[name], math.prod(shape) * dtype.itemsize, name)
            memory[name] = raw.view(dtype).reshape(shape)
        for name in engine.tensors:
            if (
                name.startswith("present_")
                and self.addresses[name] != self.addresses[name.replace("present_", "past_")]
            ):
                raise ViolationError(
                    f"{name!r} and its input are not one buffer: the cache would not be updated in place"
                )
        self.enqueued = True
        driver.submit(stream, lambda: engine.run(memory))
        return True
