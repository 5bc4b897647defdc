"""A checked network as a plan: TensorRT's builder in a thread of its own, its plan streamed to a file.

The builder's thread is not the main one, because the main thread sees Ctrl-C and SIGTERM and releases the pages of the
weights that the builder has read. No signal raises meanwhile: TensorRT logs by calling Python, and loses an exception
there, or ends the process.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from par_export.engines.network import ExpectedAttention, check_step, first_lines, parse, profile_shape
from par_export.engines.weights import MappedWeights
from par_export.errors import BuildCancelledError, BuildError
from par_export.graphs.writer import Graph
from par_runtime.backends.trt.module import TensorRT
from par_runtime.stopping import Waiting, later
from par_runtime.system import naming, write_beside

RELEASE_SECONDS = 0.02  #: how often the pages of the weights are released during a build

#: Called with what the builder is doing and how far it is, 0 to 1.
OnStep = Callable[[str, float], None]


@dataclass(frozen=True)
class Target:
    """The GPU that plans are built for: "SM80" and the like (TensorRT-RTX), or "local", this machine's."""

    name: str

    @staticmethod
    def of(text: str) -> Target:
        """The target that a request names, in any case of letters."""
        return Target(text if text == "local" else text.upper())

    @property
    def local(self) -> bool:
        """Whether it is this machine's GPU."""
        return self.name == "local"


@dataclass
class BuildOutcome:
    """What a build reports of its finished plan. ``memory`` is in bytes."""

    layers: dict[str, int]  #: kind of network layer -> how many
    log: list[str]  #: the builder's messages that name the kernels and the memory of the finished plan
    warnings: list[str]
    seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)


def make_logger(trt: TensorRT) -> Any:
    """A TensorRT logger that keeps errors, warnings, and the messages that list the layers of the finished plan."""

    class Logger(trt.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.module.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.finished: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rpartition(".")[2]
            if level in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)
            elif level == "WARNING":
                self.warnings.append(message)
            elif "LayerType:" in message or " Memory: " in message:
                self.finished.append(message)

    return Logger()


def make_monitor(trt: TensorRT, on_step: OnStep, stop: threading.Event) -> Any:
    """A progress monitor that calls ``on_step(phase, fraction of the whole)`` and cancels once ``stop`` is set."""

    class Monitor(trt.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.module.IProgressMonitor.__init__(self)
            self._open: dict[str, list[int]] = {}  # phase -> [done, total], the outermost first
            self._reached = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open[phase_name] = [0, max(num_steps, 1)]
            self._report(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)
            if not self._open:
                on_step(phase_name, 1.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._open[phase_name][0] = step + 1
            self._report(phase_name)
            return not stop.is_set()

        def _report(self, phase: str) -> None:
            fraction, share = 0.0, 1.0
            for done, total in self._open.values():  # each phase is a step of the one around it
                fraction += share * min(done, total) / total
                share /= total
            self._reached = max(self._reached, min(fraction, 1.0))
            on_step(phase, self._reached)

    return Monitor()


@contextmanager
def uninterrupted() -> Iterator[Waiting]:
    """Around :func:`build_plan`: signals that would end the process wait until all that TensorRT made is gone."""
    with later() as signals:
        try:
            yield signals
        except BaseException as error:  # TensorRT logs when its objects go, and the frames of the error keep them
            traceback.clear_frames(error.__traceback__)
            raise


def build_plan(
    trt: TensorRT,
    graph: Graph,
    data: MappedWeights,
    target: Target,
    images: Sequence[int],
    write: Callable[[memoryview], object],
    *,
    attention: ExpectedAttention | None,
    allow_tf32: bool,
    timing_cache: Path | None = None,
    reproducible: bool = False,
    on_step: OnStep = lambda *_: None,
    signals: Waiting,
) -> BuildOutcome:
    """Build ``graph`` with a profile for each batch size of ``images``; ``write`` receives the plan piece by piece.

    ``attention`` None: a graph without a cache (the decoder). A signal of ``signals``, from :func:`uninterrupted`,
    stops the build at its next step. Raises BuildError, BuildCancelledError.
    """
    log = make_logger(trt)
    builder = trt.module.Builder(log)
    flags = 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.module.OnnxParser(network, log)
    keep = parse(trt, parser, graph, data, log)
    if signals.came is not None:
        raise BuildCancelledError
    if attention is not None:
        check_step(trt, network, attention)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.module.ProfilingVerbosity.DETAILED
    _set_target(trt, config, target)
    if not allow_tf32:
        config.clear_flag(trt.module.BuilderFlag.TF32)
    if attention is not None and hasattr(trt.module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # the condition for capture
    cache = _timing_cache(trt, config, timing_cache, reproducible)
    for size in images:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shape = profile_shape(tensor.name, tuple(tensor.shape), size)
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    _run(trt, builder, network, config, data, write, log, on_step, signals)
    if cache is not None and timing_cache is not None:
        blob = config.get_timing_cache().serialize()
        write_beside(timing_cache, lambda part: part.write_bytes(blob))
    layers: dict[str, int] = {}
    for i in range(network.num_layers):
        kind = str(network.get_layer(i).type).rpartition(".")[2]
        layers[kind] = layers.get(kind, 0) + 1
    del keep, parser, network, config, builder
    memory = {
        key: max((int(n) for m in log.finished for n in re.findall(rf"{text}: (\d+) bytes", m)), default=0)
        for key, text in (("activation_bytes", "Total Activation Memory"), ("weights_bytes", "Total Weights Memory"))
    }
    return BuildOutcome(layers, log.finished, log.warnings, memory=memory)


def check_target(trt: TensorRT, target: Target) -> None:
    """Raise BuildError where ``trt`` cannot build for ``target``."""
    if not trt.rtx or target.local:
        return  # classic TensorRT builds for the GPU it is on
    known = [key for key in trt.module.ComputeCapability.__members__ if key.startswith("SM")]
    if target.name not in known:
        raise BuildError(f"target {target.name!r}: {trt.name} {trt.version} builds for {', '.join(known)} or local")


def _set_target(trt: TensorRT, config: Any, target: Target) -> None:
    if trt.rtx:
        capabilities = trt.module.ComputeCapability.__members__
        config.num_compute_capabilities = 1
        config.set_compute_capability(capabilities["CURRENT" if target.local else target.name], 0)


def _timing_cache(trt: TensorRT, config: Any, path: Path | None, reproducible: bool) -> Any:
    """The timing cache at ``path``, set in ``config``; None for none. ``reproducible``: an unknown kernel fails."""
    if trt.rtx or path is None:  # with one, TensorRT-RTX does not build without a GPU
        return None
    with naming(path):
        content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    config.set_timing_cache(cache, ignore_mismatch=False)
    if reproducible:
        config.set_flag(trt.module.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    return cache


def _run(
    trt: TensorRT,
    builder: Any,
    network: Any,
    config: Any,
    data: MappedWeights,
    write: Callable[[memoryview], object],
    log: Any,
    on_step: OnStep,
    signals: Waiting,
) -> None:
    """Build in a thread; this one waits for signals and releases the pages of the weights meanwhile.

    Raises BuildCancelledError, BuildError, and whatever ``write`` raised.
    """
    stop = threading.Event()
    config.progress_monitor = make_monitor(trt, on_step, stop)
    failure: list[BaseException] = []

    class Writer(trt.module.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.module.IStreamWriter.__init__(self)

        def write(self, piece: Any) -> int:
            try:
                view = memoryview(piece)
                write(view)
                return view.nbytes
            except BaseException as error:
                failure.append(error)
                return 0

    writer = Writer()
    done: list[bool] = []

    def work() -> None:
        try:
            done.append(bool(builder.build_serialized_network_to_stream(network, config, writer)))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="tensorrt build")
    thread.start()
    while thread.is_alive():
        thread.join(RELEASE_SECONDS)
        if signals.came is not None:  # leaving before the builder stops would crash it
            stop.set()
        data.release()
    if stop.is_set():
        raise BuildCancelledError
    if failure:
        raise failure[0]
    if done != [True]:
        raise BuildError(_explain(trt, network, log.errors))


#: What TensorRT-RTX says of Turing (SM75), whose tensor cores take half precision only: the layer, the GPU.
_NO_FP32 = re.compile(r"Cannot compile operation '(?:\w+:)?([^']{1,80})' for (.{1,40}?): FP32 GEMM is not supported")


def _explain(trt: TensorRT, network: Any, errors: list[str]) -> str:
    """The builder's own error; where attention is the reason, with the layer and its head size."""
    text = first_lines(errors)
    if no_fp32 := _NO_FP32.search(text):
        layer, gpu = no_fp32.groups()
        step = "" if layer.startswith("decoder/") else "--precision fp16 "
        return (
            f"{trt.name} {trt.version} has no fp32 matrix products for {gpu} (layer {layer}): add {step}"
            "--decoder-precision fp16"
        )
    if "ttention" not in text:
        return f"{trt.name} {trt.version} cannot build this network: {text}"
    named = re.search(r'attention operation "([^"]+)"', text)
    sizes = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.module.LayerType.ATTENTION_INPUT:
            sizes[layer.name] = int(layer.get_input(0).shape[-1])
    name = named.group(1) if named else next(iter(sizes), "?")  # the message often names none
    size = sizes.get(name, next(iter(sizes.values()), 0))
    return (
        f"no fused attention kernel for layer {name!r} with head size {size} in {trt.name} {trt.version}: export "
        "again (head sizes are padded to a multiple of 8), or take another precision. TensorRT's message: " + text
    )
