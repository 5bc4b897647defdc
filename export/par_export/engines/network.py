"""One ONNX graph into one TensorRT plan: parsed without copying its weights, checked, built, streamed to a file.

What is checked here is what cannot be seen in the plan later: that every attention layer is fused and sees only
what it may see, that every cache is updated in place, that the parser ignored nothing.
"""

from __future__ import annotations

import mmap
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from par_export.graphs.writer import Graph
from par_runtime.backends.trt.module import TensorRT

SWEEP_SECONDS = 0.02
#: Inputs whose first dimension is rows (two per image); all other dynamic dimensions are images.
ROW_INPUTS = ("ids", "positions", "write", "length", "image")


#: Called with what the builder is doing and how far it is, 0 to 1.
OnStep = Callable[[str, float], None]


class BuildError(Exception):
    """A plan that cannot be built as asked; the message names the layer and how to fix it."""


class BuildCancelledError(Exception):
    """The build was stopped by Ctrl-C; nothing was written."""


@dataclass(frozen=True)
class Target:
    """What plans are built for: "SM80" and the like (TensorRT-RTX), or "local", this machine's GPU."""

    name: str

    @property
    def local(self) -> bool:
        return self.name == "local"


@dataclass(frozen=True)
class Attention:
    """What the step network must contain, from the bundle: checked against the parsed network."""

    layers: int
    lengths: bool  #: visible keys as a count per row, else as a mask
    decomposable: bool  #: fp32 has no fused kernel: such a plan is for checking only


@dataclass
class Built:
    """A finished plan: how many layers of each kind, the builder's kernels, its memory and what it warned of."""

    layers: dict[str, int]
    log: list[str]
    warnings: list[str]
    seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)


class MappedWeights:
    """A weights file mapped into memory; pages that were read can be given back while a build goes on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        self._array = np.frombuffer(self._map, np.uint8)  # for its address
        self.address = int(self._array.ctypes.data)

    def sweep(self) -> None:
        """Give back the pages; they are read again from the file if needed."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        del self._array
        self._map.close()
        self._file.close()


def make_log(trt: TensorRT) -> Any:
    """A logger that keeps warnings, errors, and the finished engine's layers."""

    class Log(trt.module.ILogger):  # type: ignore[misc, name-defined]
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

    return Log()


def make_monitor(trt: TensorRT, on_step: OnStep, stop: threading.Event) -> Any:
    """A progress monitor: ``on_step(phase, fraction of the whole)``; returns False (cancel) once ``stop`` is set."""

    class Monitor(trt.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.module.IProgressMonitor.__init__(self)
            self._open: dict[str, list[int]] = {}  # phase -> [done, total], the outermost first
            self._reached = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._open[phase_name] = [0, max(num_steps, 1)]
            self._tell(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)
            if not self._open:
                on_step(phase_name, 1.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._open[phase_name][0] = step + 1
            self._tell(phase_name)
            return not stop.is_set()

        def _tell(self, phase: str) -> None:
            fraction, share = 0.0, 1.0
            for done, total in self._open.values():  # each phase is a step of the one around it
                fraction += share * min(done, total) / total
                share /= total
            self._reached = max(self._reached, min(fraction, 1.0))
            on_step(phase, self._reached)

    return Monitor()


def build_plan(
    trt: TensorRT,
    graph: Graph,
    data: MappedWeights,
    target: Target,
    images: Sequence[int],
    write: Callable[[memoryview], object],
    *,
    attention: Attention | None,
    allow_tf32: bool,
    timing_cache: Path | None = None,
    reproducible: bool = False,
    on_step: OnStep = lambda *_: None,
) -> Built:
    """Build ``graph`` with a profile for each batch size of ``images``; ``write`` receives the plan piece by piece.

    ``attention`` None: a graph without a cache (the decoder). Raises BuildError, BuildCancelledError.
    """
    log = make_log(trt)
    builder = trt.module.Builder(log)
    flags = 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.module.OnnxParser(network, log)
    keep = _parse(trt, parser, graph, data, log)
    if attention is not None:
        check_step(trt, network, attention)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.module.ProfilingVerbosity.DETAILED
    _aim(trt, config, target)
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
    _run(trt, builder, network, config, data, write, log, on_step)
    if cache is not None and timing_cache is not None:
        part = timing_cache.with_name(timing_cache.name + ".part")
        part.write_bytes(config.get_timing_cache().serialize())
        part.replace(timing_cache)
    layers: dict[str, int] = {}
    for i in range(network.num_layers):
        kind = str(network.get_layer(i).type).rpartition(".")[2]
        layers[kind] = layers.get(kind, 0) + 1
    del keep, parser, network, config, builder
    memory = {
        key: max((int(n) for m in log.finished for n in re.findall(rf"{text}: (\d+) bytes", m)), default=0)
        for key, text in (("activation_bytes", "Total Activation Memory"), ("weights_bytes", "Total Weights Memory"))
    }
    return Built(layers, log.finished, log.warnings, memory=memory)


def profile_shape(name: str, shape: tuple[int, ...], images: int) -> tuple[int, ...]:
    """``shape`` with its dynamic first dimension filled in for ``images`` guided images."""
    rows = name in ROW_INPUTS or name.startswith("past_")
    return tuple((2 * images if rows else images) if n == -1 else n for n in shape)


def check_step(trt: TensorRT, network: Any, wanted: Attention) -> None:
    """Check the parsed step network and finish it: fused attention, visibility, caches in place. Raises BuildError."""
    module = trt.module
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    attentions = 0
    updated = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == module.LayerType.ATTENTION_INPUT:
            attentions += 1
            masked = layer.num_inputs > 3 and layer.get_input(3) is not None
            layer.__class__ = module.IAttentionInputLayer
            layer.attention.decomposable = wanted.decomposable
            if wanted.lengths:
                # The parser drops ONNX's nonpad_kv_seqlen without a word; attention would then see garbage.
                layer.attention.key_value_lengths = inputs["length"]
                visible = layer.attention.key_value_lengths is not None
            else:
                visible = masked
            if not visible:
                raise BuildError(
                    f"attention layer {layer.name!r} has neither a mask nor lengths, so it would see unwritten keys; "
                    "export the bundle again"
                )
        elif layer.type == module.LayerType.KV_CACHE_UPDATE:
            updated[layer.get_input(0).name] = layer.get_output(0)
    if attentions != wanted.layers:
        raise BuildError(
            f"{attentions} of {wanted.layers} attention layers were recognised by {trt.name} {trt.version}; "
            "export the bundle again, or use the version of docs/install.md"
        )
    for name in inputs:
        if name.startswith("past_"):
            present = name.replace("past_", "present_")
            output = updated.get(name)
            if output is None or output.name != present or not output.is_network_output:
                raise BuildError(
                    f"cache {name!r} is not updated in place: its output {present!r} is not one KV_CACHE_UPDATE of it; "
                    "export the bundle again"
                )


def _parse(trt: TensorRT, parser: Any, graph: Graph, data: MappedWeights, log: Any) -> bytes:
    """Parse ``graph``, weights by address in ``data``. Returns what must live as long as the network."""
    model = graph.model()
    serialized: bytes = model.SerializeToString()
    ok = parser.load_model_proto(serialized)
    for tensor in model.graph.initializer:
        if ok and tensor.data_location == onnx.TensorProto.EXTERNAL:
            at = {item.key: int(item.value) for item in tensor.external_data if item.key != "location"}
            ok = parser.load_initializer(tensor.name, data.address + at["offset"], at["length"])
    ok = ok and parser.parse_model_proto()
    errors = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
    if not ok or errors:
        raise BuildError(f"{trt.name} {trt.version} cannot parse {graph.name}: {_first(errors or log.errors)}")
    for warning in log.warnings:
        if "unused input" in warning.lower():
            raise BuildError(
                f"{trt.name} {trt.version} ignores an input of {graph.name}: {warning}; it would compute garbage"
            )
    return serialized


def _aim(trt: TensorRT, config: Any, target: Target) -> None:
    if not trt.rtx:
        return  # classic TensorRT builds for the GPU it is on
    capabilities = trt.module.ComputeCapability
    name = "CURRENT" if target.local else target.name
    known = [key for key in capabilities.__members__ if key.startswith("SM")]
    if name not in capabilities.__members__ or name == "NONE":
        raise BuildError(f"target {target.name!r}: {trt.name} {trt.version} builds for {', '.join(known)} or local")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capabilities.__members__[name], 0)


def _timing_cache(trt: TensorRT, config: Any, path: Path | None, reproducible: bool) -> Any:
    if trt.rtx or path is None:  # with one, TensorRT-RTX does not build without a GPU
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
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
) -> None:
    """Build in a thread, so that this one hears Ctrl-C and gives back the pages of the weights that were read."""
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
    main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    # No exception while the builder runs: it stops at its next step, and leaving before it does would crash it.
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set()) if main else None
    try:
        thread.start()
        while thread.is_alive():
            thread.join(SWEEP_SECONDS)
            data.sweep()
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)
    if stop.is_set():
        raise BuildCancelledError
    if failure:
        raise failure[0]
    if done != [True]:
        raise BuildError(_explain(trt, network, log.errors))


def _explain(trt: TensorRT, network: Any, errors: list[str]) -> str:
    """The builder's own error, and for attention which layer and head size it was about."""
    text = _first(errors)
    if "ttention" not in text:
        return f"{trt.name} {trt.version} cannot build this network: {text}"
    named = re.search(r'attention operation "([^"]+)"', text)
    sizes = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.module.LayerType.ATTENTION_INPUT:
            sizes[layer.name] = int(layer.get_input(0).shape[-1])
    name = named.group(1) if named else next(iter(sizes), "?")  # it often does not say which
    return (
        f"no fused attention kernel for layer {name!r} with head size {sizes.get(name, next(iter(sizes.values()), 0))} in "
        f"{trt.name} {trt.version}: export again (head sizes are padded to a multiple of 8), or take another precision. "
        f"It says: {text}"
    )


def _first(errors: list[str]) -> str:
    lines = [line.strip() for error in errors for line in error.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600] or "no reason was given"
