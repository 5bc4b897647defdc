"""An engine of kernels with random weights as a subject of a benchmark, and the time of each of its kernels.

The bundle's weights file may be full of holes (``random_bundle.NoTensors``): after loading, every matrix is filled
with random numbers on the device, in the form in which kernels read it. Loading is timed as it is: it reads the same
bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_export.kernels.spec import STORED_KINDS
from par_export.kernels.step_weights import NUMBER_BYTES
from par_runtime.backends.gpu.backend import GpuBackend
from par_runtime.backends.kernels.modules import Prepared
from par_runtime.backends.kernels.plan import KernelContext, KernelProgram
from par_runtime.backends.program import Kernels, Launch, Pointer, Weight
from par_runtime.bench.gpu import runs_ms
from par_runtime.bench.pool import Pool
from par_runtime.bench.subjects.pipeline import PipelineSubject
from par_runtime.bundle import Bundle
from par_runtime.errors import EngineError
from par_runtime.pipeline import Pipeline
from par_runtime.quantised import MOST_CODE, SCALE
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule

STD = 0.02  #: of random weights, as in a model that was never trained
#: Random numbers that all matrices are filled with: no multiple of a row of any matrix, so that no two rows are alike,
#: nor of 3, by which a pool moves on.
POOL_NUMBERS = (2**16 - 3) * 256
SAME = 3  #: calls of which the logits must be the same bits
CALLS = 4  #: of a graph in which whole calls are timed
REPEATS = 5
TABLES = ("cos", "sin")  #: two-dimensional, but no weights


class EngineSubject(PipelineSubject):
    """A bundle on its engine of kernels on ``device``. Raises what ``Pipeline.load`` raises, EngineError.

    ``filled``: matrices are filled at once; else with what :meth:`logits` needs.
    """

    def __init__(self, path: Path, label: str, device: str, filled: bool = True) -> None:
        began = time.perf_counter()
        pipeline = Pipeline.load(path, device, selftest=False)
        load_ms = 1e3 * (time.perf_counter() - began)
        super().__init__(pipeline, label, load_ms)
        self._packed = False
        if filled:
            fill(pipeline)
        # Matrices are read without the padding of heads; the bound must not be easier for it.
        architecture = replace(self.info.architecture, head_dim=pipeline.bundle.model["head_dim"])
        self.info = replace(self.info, architecture=architecture)

    def kernels(self, images: int, guided: bool = True, image: bool = True) -> list[dict[str, Any]]:
        """What each kernel takes in a call in the middle of an image, and in the decoder.

        ``image``: one is made before, which takes its time; without it tokens are random, and keys what was there.
        The launches of a kernel in all layers run one after the other in a graph, each time after all others of a call,
        whose weights are what the caches hold then. ``count``: how many these are;
        ``samples_us``: microseconds of one of them; ``bytes`` of the matrices that one of them reads, ``of``: the name
        of the first.
        """
        backend = gpu_backend(self.pipeline)
        contexts = self._in_the_middle(images, guided, image)
        profile = next(size for size in backend.engine.images if size >= images)
        out = []
        for name, program in programs(self.pipeline).items():
            launches = list(program.program.launches(profile))
            for kernel, which in by_kernel(launches).items():
                took = self._times(contexts[name].launches, which, sorted({*range(len(launches))} - {*which}))
                out.append(
                    {
                        "program": name,
                        "kernel": kernel,
                        "source": program.shared.modules[kernel].kernel.source,
                        "of": matrix_of(launches[which[0]][0], kernels_of(self.pipeline)),
                        "grid": list(launches[which[0]][0].grid),
                        "count": len(which),
                        "samples_us": [us / len(which) for us in took],
                        "bytes": weight_bytes(launches[which[0]], kernels_of(self.pipeline)),
                    }
                )
        return out

    def call_us(self, images: int) -> list[float]:
        """Microseconds of a guided call in the middle of an image: of several graphs of :data:`CALLS` calls each.

        Its tokens are random; keys and values are what was there.
        """
        prepared = self._in_the_middle(images, True, image=False)["step"].launches
        return [us / CALLS for us in self._times(prepared, None, None, CALLS)]

    def logits(self, images: int, into: Path) -> int:
        """Write the logits of a call in the middle of an image into the file ``into``: float32, (images * n, codes).

        All that they depend on is random and the same for every engine of this bundle, in whatever order it packs its
        matrices: these, keys, values, tokens. So two engines differ by rounding alone, or one of them is wrong.
        Returns how many of :data:`SAME` calls gave other bits than the first.
        """
        backend, bundle = gpu_backend(self.pipeline), self.pipeline.bundle
        if not self._packed:
            repack(self.pipeline)
            self._packed = True
        prepared, rows = self._in_the_middle(images, True, image=False)["step"].launches, 2 * images
        numbers = random_numbers(2, 1.0)
        size = rows * bundle.cache.heads * bundle.n_tokens * bundle.cache.head_dim
        size *= NUMBER_BYTES[backend.engine.precision]
        with Pool(backend.device, backend.stream, as_type(numbers, f"*{backend.engine.precision}")) as pool:
            for name in bundle.cache.inputs:
                pool.fill(prepared.address(name), size)
        shape, found = (images * bundle.group_size, bundle.vocab_size), list[NDArray[np.uint8]]()
        with backend.device.pinned(4 * math.prod(shape)) as staging:
            for _ in range(SAME):
                prepared.enqueue()
                backend.stream.download(staging, prepared.address("logits"), staging.size)
                backend.stream.synchronize()
                found.append(staging.array.copy())
        with into.open("wb") as file:
            np.save(file, found[0].view(np.float32).reshape(shape))
        return sum(not np.array_equal(found[0], other) for other in found[1:])

    def _in_the_middle(self, images: int, guided: bool, image: bool) -> Mapping[str, KernelContext]:
        """The contexts at a call in the middle of the last phase, on the tokens of an image that was just made, or
        without ``image`` on random ones.
        """
        backend, bundle = gpu_backend(self.pipeline), self.pipeline.bundle
        if image:
            self._generate(self.pipeline, images, guided)
        settings = image_settings(bundle, images, guidance=self._guidance(guided), guidance_interval=-1)
        schedule = Schedule.of(bundle, self._labels(images), settings, list(range(images)))
        call = middle_call(bundle)
        contexts: Any = backend.at_call(schedule.batch, schedule.class_ids, schedule.noise, call)
        if not image:
            tokens = np.random.default_rng(3).integers(0, bundle.vocab_size, 2 * images * bundle.group_size)
            with backend.device.pinned(tokens.nbytes) as staging:
                staging.array[:] = tokens.view(np.uint8)
                backend.stream.upload(contexts["step"].launches.address("ids"), staging, tokens.nbytes)
                backend.stream.synchronize()
        return contexts

    def _times(
        self, prepared: Prepared, which: Sequence[int] | None, before: Sequence[int] | None, times: int = 1
    ) -> list[float]:
        """Microseconds of a graph of the launches ``which`` (None: all), ``times`` over; :data:`REPEATS` of them.

        The launches ``before`` come before each, untimed. They leave other weights in the caches, unwritten, and the
        clocks up; zeros written over a block of memory would still be on their way to it while the graph runs.
        """
        backend = gpu_backend(self.pipeline)
        stream = backend.stream
        with stream.capture() as captured:
            for _ in range(times):
                prepared.enqueue(which)
        with captured.graph as graph:
            launch, between = partial(graph.launch, stream), partial(prepared.enqueue, before)
            return [1e3 * ms for ms in runs_ms(backend.device, stream, launch, REPEATS, between)]


def middle_call(bundle: Bundle) -> int:
    """The number of the call in the middle of the last phase."""
    return bundle.calls - 1 - bundle.phases[-1].repeat // 2


def gpu_backend(pipeline: Pipeline) -> GpuBackend:
    """The pipeline's backend. Raises EngineError where it is none of our kernels."""
    backend = pipeline.backend
    if not isinstance(backend, GpuBackend) or backend.engine.kernels is None:
        raise EngineError(f"{pipeline.bundle.path}: runs on {backend.info.name}, not on an engine of kernels")
    return backend


def kernels_of(pipeline: Pipeline) -> Kernels:
    """The pipeline's engine of kernels. Raises EngineError."""
    kernels = gpu_backend(pipeline).engine.kernels
    assert kernels is not None
    return kernels


def programs(pipeline: Pipeline) -> Mapping[str, KernelProgram]:
    """Its programs by name. Raises EngineError."""
    return gpu_backend(pipeline).programs  # type: ignore[return-value]


def by_kernel(launches: Sequence[tuple[Launch, int]]) -> dict[str, list[int]]:
    """kernel -> the numbers of its launches, in the order in which kernels come first."""
    out: dict[str, list[int]] = {}
    for i, (launch, _) in enumerate(launches):
        out.setdefault(launch.kernel, []).append(i)
    return out


def matrix_of(launch: Launch, kernels: Kernels) -> str:
    """The name of the first matrix that a launch is given, with {i} for the number of the layer; "" without one."""
    for argument in launch.arguments:
        if isinstance(argument, Pointer):
            weight = kernels.weights.get(argument.of_layer(0)[0])
            if weight is not None and weight.pack is not None:
                return argument.name
    return ""


def weight_bytes(launch: tuple[Launch, int], kernels: Kernels) -> int:
    """Bytes of the matrices that a launch in its layer is given: of what is packed, which is read as a whole.

    Of tables (embeddings, rotations, gains) it reads a few rows.
    """
    one, layer = launch
    names = {a.of_layer(layer)[0] for a in one.arguments if isinstance(a, Pointer)}
    weights = [kernels.weights[name] for name in names & kernels.weights.keys()]
    return sum(weight.bytes for weight in weights if weight.pack is not None)


def fill(pipeline: Pipeline, numbers: int = POOL_NUMBERS) -> int:
    """Fill every matrix of the engine with random numbers; returns how many bytes. Raises EngineError, CudaError.

    They are uniform, with the standard deviation of an untrained model. Codes are random bytes; their scales were read.
    """
    backend, kernels = gpu_backend(pipeline), kernels_of(pipeline)
    addresses = programs(pipeline)["step"].shared.addresses
    kinds: dict[str, list[str]] = {}
    for name, weight in kernels.weights.items():
        kind = matrix_type(name, weight, kernels)
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
    uniform = random_numbers(0, STD, numbers)
    backend.device.activate()
    done = 0
    for kind, names in kinds.items():
        with Pool(backend.device, backend.stream, as_type(uniform, kind)) as pool:
            for name in names:
                pool.fill(addresses[name], kernels.weights[name].bytes)
                done += kernels.weights[name].bytes
    return done


def random_numbers(seed: int, deviation: float, count: int = POOL_NUMBERS) -> NDArray[np.float32]:
    """Uniform numbers around zero with that standard deviation, drawn in float32: every process draws many of them."""
    numbers = np.random.default_rng(seed).random(count, np.float32)
    numbers -= np.float32(0.5)
    numbers *= np.float32(12**0.5 * deviation)
    return numbers


def repack(pipeline: Pipeline) -> None:
    """Fill every matrix with random numbers in the order in which the bundle stores it, and have the engine pack it.

    So engines that pack differently have the same matrices. Raises EngineError, CudaError.
    """
    backend, kernels = gpu_backend(pipeline), kernels_of(pipeline)
    shared = programs(pipeline)["step"].shared
    matrices = {name: weight for name, weight in kernels.weights.items() if matrix_type(name, weight, kernels)}
    uniform = random_numbers(1, STD)
    backend.device.activate()
    with ExitStack() as held:
        largest = max(weight.source[1] for weight in matrices.values())
        raw = held.enter_context(backend.device.allocate(largest, "a matrix as it is stored"))
        pools: dict[str, Pool] = {}
        for name, weight in sorted(matrices.items()):
            assert weight.stored is not None
            kind = "*u8" if weight.stored.dtype in MOST_CODE else STORED_KINDS[weight.stored.dtype]
            if kind not in pools:
                pools[kind] = held.enter_context(Pool(backend.device, backend.stream, as_type(uniform, kind)))
            packed, pack = shared.addresses[name], weight.pack
            pools[kind].fill(packed if pack is None else raw.pointer, weight.source[1])
            if pack is not None:
                ends = {"raw": raw.pointer, "packed": packed}
                Prepared(shared.modules, [(pack, 0)], ends, backend.stream).enqueue()
        backend.stream.synchronize()


def matrix_type(name: str, weight: Weight, kernels: Kernels) -> str | None:
    """The type of the numbers of a matrix in device memory, "*fp16", or "*u8" of codes; None where ``weight`` is
    something else.
    """
    stored = weight.stored
    if stored is None or name in TABLES or name.endswith(SCALE) or math.prod(stored.shape) == max(stored.shape):
        return None
    if stored.dtype in MOST_CODE:
        return "*u8"
    if weight.pack is None:
        return STORED_KINDS[stored.dtype]
    parameters = kernels.kernels[weight.pack.kernel].parameters
    return next(
        kind
        for (_, kind), argument in zip(parameters, weight.pack.arguments, strict=True)
        if isinstance(argument, Pointer) and argument.name == "packed"
    )


def as_type(numbers: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """``numbers``, uniform around zero, as kernels of that type of parameter read them."""
    if kind == "*u8":  # packed codes have no sign, and every byte is one of int8, or two of int4
        return np.floor((numbers / np.abs(numbers).max() + 1) * 127.999).astype(np.uint8)
    if kind == "*bf16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(np.float16 if kind == "*fp16" else np.float32)


def open_subject(spec: Mapping[str, Any]) -> EngineSubject:
    """The subject that the specification of a worker describes; see ``bench/subjects/worker.py``."""
    return EngineSubject(Path(spec["path"]), spec["label"], spec["device"], spec.get("filled", True))
