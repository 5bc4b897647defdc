"""Bundle to an engine of kernels: planned, compiled and described for each target, without a GPU and without torch.

The folder holds a cubin for each kernel, ``constants.data`` with the few numbers that the build computes, and
``engine.json`` with the list of launches. It holds no weights: the runtime takes them from the bundle's own file and
puts them in order on the device. See ``docs/kernels.md``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import par_model
from par_export import graphs, kernels
from par_export.engines import contents as engine_contents
from par_export.engines import publish as engine_publish
from par_export.engines.place import place
from par_export.engines.publish import cache_of, check_images, publish, source_hash
from par_export.engines.request import local_gpu
from par_export.errors import BuildError
from par_export.fp16 import check_build
from par_export.graphs.decoder import HALF_DECODER
from par_export.kernels import report as kernels_report
from par_export.kernels.compiler import Compiled, Compiler
from par_export.kernels.contents import Contents
from par_export.kernels.plan import Planner, plan
from par_export.kernels.request import DECODER_PRECISIONS, NAME_A_TARGET, PRECISIONS, KernelsRequest
from par_export.kernels.spec import Planned
from par_export.kernels.targets import Target, target_of
from par_runtime import __version__
from par_runtime.backends import program
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA, KERNELS, Engine
from par_runtime.backends.program import ALIGN, CONSTANTS, VERSION, Kernel, Kernels
from par_runtime.bundle import Bundle, seal
from par_runtime.dtypes import DTYPE

SAMPLING = "exact"  #: every top-k, top-p and codebook size
OnStep = Callable[[str, float], None]


def build_kernels(
    request: KernelsRequest,
    say: Callable[[str], None] = print,
    on_step: OnStep = lambda *_: None,
    planner: Planner = plan,
) -> list[Path]:
    """Build the engines of ``request``, or take them from the cache; returns their folders, one for each target.

    ``say`` receives lines of text for the user; ``on_step`` what is going on, and the fraction that is done. Raises
    BuildError, OutputError, BundleError, OSError.
    """
    _check_request(request)
    targets = [_Card.of(name) for name in request.targets]
    bundle = Bundle.open(request.bundle, verify="full")
    precision, decoder = _precisions(bundle, request)
    folder_of_engines = place(bundle, request.out, say)
    cache = cache_of(request, say)
    folders = []
    with Compiler(request.workers) as compiler:
        contents = Contents(bundle, precision, decoder)
        for card in targets:
            build = _Build(request, contents, card, compiler, planner)
            label = f"-{request.label}" if request.label else ""
            out = folder_of_engines / f"{KERNELS}-{VERSION}-{card.target.name.lower()}-{precision}{label}"
            publish(out, bundle, cache, build.ingredients(), partial(build.write, say=say, on_step=on_step), say)
            for line in kernels_report.table(json.loads((out / ENGINE_JSON).read_text())["report"]):
                say(line)
            folders.append(out)
    return folders


def _check_request(request: KernelsRequest) -> None:
    if request.precision is not None and request.precision not in PRECISIONS:
        raise BuildError(
            f"precision {request.precision}: kernels compute in {' or '.join(PRECISIONS)}; give one of these"
        )
    if request.decoder_precision is not None and request.decoder_precision not in DECODER_PRECISIONS:
        raise BuildError(
            f"decoder precision {request.decoder_precision}: the decoder's kernels compute in "
            f"{' or '.join(DECODER_PRECISIONS)}; give one of these"
        )
    check_images(request.images)


def _precisions(bundle: Bundle, request: KernelsRequest) -> tuple[str, str]:
    """The precisions of step and decoder, checked against what the manifest says of the model. Raises BuildError."""
    quantised = sorted({entry.dtype for entry in bundle.weights.values()} & {"int8", "int4"})
    if bundle.precision not in DTYPE or quantised:
        stored = quantised[0] if quantised else bundle.precision
        raise BuildError(
            f"{bundle.path}: its weights are quantised to {stored}; kernels read fp32, fp16 and bf16: give "
            "--engine tensorrt, or export the bundle again in fp16 or bf16"
        )
    precision = request.precision or bundle.precision
    if precision not in PRECISIONS:
        raise BuildError(
            f"{bundle.path}: the bundle is in {precision}, kernels compute in {' or '.join(PRECISIONS)}; give "
            "--precision fp16 or --precision bf16"
        )
    decoder = request.decoder_precision or ("fp16" if HALF_DECODER in bundle.graphs else "fp32")
    check_build(bundle.parity, DTYPE[precision], DTYPE[decoder], others="--precision bf16")
    return precision, decoder


@dataclass(frozen=True)
class _Card:
    """What an engine is built for: a target, and where that was "local", this machine's card."""

    target: Target
    device: str | None

    @staticmethod
    def of(name: str) -> _Card:
        if name != "local":
            return _Card(target_of(name), None)
        capability, device = local_gpu(otherwise=NAME_A_TARGET)
        return _Card(target_of(capability), device)


@dataclass(frozen=True)
class _Build:
    """The build of one engine."""

    request: KernelsRequest
    contents: Contents
    card: _Card
    compiler: Compiler
    planner: Planner

    @property
    def target(self) -> Target:
        return self.card.target

    def ingredients(self) -> dict[str, Any]:
        """All that decides what the build makes, as plain values: the key of the engine cache."""
        return {
            "bundle": self.contents.bundle.hash,
            "parvis": __version__,
            "schema": ENGINE_SCHEMA,
            "runtime": [KERNELS, VERSION, self.target.name],
            "compiler": [self.compiler.version, *self.compiler.tools],
            "precision": [self.contents.precision, self.contents.decoder_precision],
            "images": list(self.request.images),
            "sources": source_hash((kernels, graphs, par_model, engine_contents, engine_publish, program)),
        }

    def write(self, folder: Path, say: Callable[[str], None], on_step: OnStep) -> None:
        """Plan, compile and describe the engine in ``folder``. Raises BuildError."""
        started = time.monotonic()
        bundle, name = self.contents.bundle, self.target.name
        on_step(f"{name}: planning", 0.0)
        self.contents.check_range()
        planned = self.planner(self.contents, self.request.images, self.target)
        planned_at = time.monotonic()
        compiled = self.compiler.compile(
            planned.specs.values(), self.target, lambda done, of: on_step(f"{name}: kernel {done} of {of}", done / of)
        )
        self._check(planned, compiled)
        compiled_at = time.monotonic()
        engine = _written(folder, planned, compiled, self.compiler.version, self.contents.decoder_precision)
        times = {
            "seconds": round(time.monotonic() - started, 2),
            "compile_seconds": round(compiled_at - planned_at, 2),
        }
        report = times | kernels_report.report(self.contents, engine, compiled, self.compiler)
        document = {
            "schema": ENGINE_SCHEMA,
            "bundle": bundle.hash,
            "parvis": __version__,
            "runtime": KERNELS,
            "version": VERSION,
            "target": name,
            "device": None,
            "precision": self.contents.precision,
            "decoder_precision": self.contents.decoder_precision,
            "mode": "shared",
            "images": list(self.request.images),
            "sampling": SAMPLING,
            "plans": {},
            "decoder": None,
            "kernels": program.to_json(engine),
            "tuned": {},
            "report": report,
        }
        sealed = seal(document)
        (folder / ENGINE_JSON).write_text(json.dumps(sealed, separators=(",", ":")))
        Engine.open(folder, bundle)  # what the runtime will check
        say(
            f"{bundle.name}: {' and '.join(planned.programs)} for {name}, {len(compiled)} kernels by "
            f"{self.compiler.version}, {self.contents.precision}, in {times['seconds']:.1f} s, peak memory "
            f"{report['peak_memory_bytes'] / 1e6:.0f} MB"
        )

    def _check(self, planned: Planned, compiled: dict[str, Compiled]) -> None:
        """Raise BuildError for the first kernel that cannot run well on the target."""
        for name, spec in planned.specs.items():
            fault = compiled[name].fault(self.target)
            if fault is not None:
                raise BuildError(f"kernel {spec.source} for {self.target.name} by {self.compiler.version} {fault}")


def _written(
    folder: Path, planned: Planned, compiled: dict[str, Compiled], compiler: str, decoder_precision: str
) -> Kernels:
    """Write cubins and constants into ``folder``; returns the engine that they and the plan make."""
    entries = {}
    for name, spec in planned.specs.items():
        kernel = compiled[name]
        (folder / f"{name}.cubin").write_bytes(kernel.cubin)
        entries[name] = Kernel(
            file=f"{name}.cubin",
            bytes=len(kernel.cubin),
            sha256=hashlib.sha256(kernel.cubin).hexdigest(),
            function=kernel.function,
            source=spec.source,
            constants=dict(spec.constants),
            parameters=spec.parameters,
            trailing=kernel.trailing,
            warps=kernel.warps,
            shared=kernel.shared,
            registers=kernel.registers,
            spills=kernel.spills,
            dependent=spec.dependent,
        )
    data = bytearray()
    weights = dict(planned.weights)
    for name, content in planned.constants.items():
        data += b"\0" * (-len(data) % ALIGN)
        weights[name] = replace(weights[name], bytes=len(content), offset=len(data))
        data += content
    (folder / CONSTANTS).write_bytes(data)
    return Kernels(
        compiler=compiler,
        decoder_precision=decoder_precision,
        kernels=entries,
        programs=planned.programs,
        weights=weights,
        constants_bytes=len(data),
        constants_sha256=hashlib.sha256(data).hexdigest(),
    )
