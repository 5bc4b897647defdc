"""Bundle to an engine of kernels: planned, compiled and described for each target, without a GPU and without torch.

The folder holds a cubin for each kernel, ``constants.data`` with the few numbers that the build computes, and
``engine.json`` with the list of launches. It holds no weights: the runtime takes them from the bundle's own file and
puts them in order on the device. See ``docs/kernels.md``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from par_export import graphs, kernels
from par_export.engines import contents as engine_contents
from par_export.engines import publish as engine_publish
from par_export.engines.place import place
from par_export.engines.publish import MODEL, cache_of, check_images, publish, source_hash
from par_export.engines.request import local_gpu
from par_export.errors import BuildError
from par_export.fp16 import check_build
from par_export.graphs.decoder import HALF_DECODER
from par_export.kernels import report as kernels_report
from par_export.kernels.compiler import Compiled, Compiler
from par_export.kernels.contents import Contents
from par_export.kernels.plan import Planner, plan
from par_export.kernels.request import DECODER_PRECISIONS, NAME_A_TARGET, NARROW, PRECISIONS, KernelsRequest
from par_export.kernels.spec import Planned, Refused, Spec
from par_export.kernels.targets import Target, runs_on, target_of
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
    check_request(request)
    targets = [target(name) for name in request.targets]
    bundle = Bundle.open(request.bundle, verify="full")
    contents = Contents(bundle, *precisions(bundle, request))
    folder_of_engines = place(bundle, request.out, say)
    cache = cache_of(request, say)
    folders = []
    with Compiler(request.workers) as compiler:
        for each in targets:
            build = Build(contents, request.images, each, compiler, planner)
            out = folder_of_engines / build.name
            publish(out, bundle, cache, build.ingredients(), partial(build.write, say=say, on_step=on_step), say)
            for line in kernels_report.table(json.loads((out / ENGINE_JSON).read_text())["report"]):
                say(line)
            folders.append(out)
    return folders


def check_request(request: KernelsRequest) -> None:
    """Raise BuildError where ``request`` asks for what kernels cannot do."""
    if request.precision is not None and request.precision not in PRECISIONS:
        why = ""
        if request.precision in NARROW:
            why = f" ({NARROW[request.precision]}; weights of int8 and int4 are the bundle's: parvis calibrate)"
        raise BuildError(
            f"precision {request.precision}: kernels compute in {' or '.join(PRECISIONS)}{why}; give one of these"
        )
    if request.decoder_precision is not None and request.decoder_precision not in DECODER_PRECISIONS:
        raise BuildError(
            f"decoder precision {request.decoder_precision}: the decoder's kernels compute in "
            f"{' or '.join(DECODER_PRECISIONS)}; give one of these"
        )
    check_images(request.images)


def precisions(bundle: Bundle, request: KernelsRequest) -> tuple[str, str]:
    """The precisions of step and decoder, checked against what the manifest says of the model. Raises BuildError.

    Quantised matrices stay codes, which become numbers of the step's precision as they are read.
    """
    precision = request.precision or bundle.precision
    if precision not in PRECISIONS:
        raise BuildError(
            f"{bundle.path}: the bundle is in {precision}, kernels compute in {' or '.join(PRECISIONS)}; give "
            "--precision fp16 or --precision bf16"
        )
    decoder = request.decoder_precision or ("fp16" if HALF_DECODER in bundle.graphs else "fp32")
    check_build(bundle.parity, DTYPE[precision], DTYPE[decoder], others="--precision bf16")
    return precision, decoder


def target(name: str, index: int = 0) -> Target:
    """The target of that name; "local": what runs on GPU ``index`` of this machine. Raises BuildError."""
    if name != "local":
        return target_of(name)
    here, _ = local_gpu(index, otherwise=NAME_A_TARGET)
    return target_of(runs_on(int(here.removeprefix("SM"))) or here)


@dataclass(frozen=True)
class Build:
    """The build of one engine, for batches of ``images``."""

    contents: Contents
    images: tuple[int, ...]
    target: Target
    compiler: Compiler
    planner: Planner = plan

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{KERNELS}-{VERSION}-{self.target.name.lower()}-{self.contents.precision}"

    def ingredients(self) -> dict[str, Any]:
        """All that decides what the build makes, as plain values: the key of the engine cache."""
        return {
            "bundle": self.contents.bundle.hash,
            "parvis": __version__,
            "schema": ENGINE_SCHEMA,
            "runtime": [KERNELS, VERSION, self.target.name],
            "compiler": [self.compiler.version, *self.compiler.tools],
            "precision": [self.contents.precision, self.contents.decoder_precision],
            "images": list(self.images),
            "sources": sources(),
        }

    def write(
        self,
        folder: Path,
        say: Callable[[str], None] = lambda _: None,
        on_step: OnStep = lambda *_: None,
        device: str | None = None,
        tuned: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Plan, compile and describe the engine in ``folder``. Raises BuildError.

        ``device``: the only card that it is for; ``tuned``: what was measured there.
        """
        started = time.monotonic()
        bundle, name = self.contents.bundle, self.target.name
        on_step(f"{name}: planning", 0.0)
        self.contents.check_range()
        planned, compiled, compile_seconds = self.compiled(on_step)
        engine = write_files(folder, planned, compiled, self.compiler.version, self.contents.decoder_precision)
        times = {
            "seconds": round(time.monotonic() - started, 2),
            "compile_seconds": round(compile_seconds, 2),
        }
        report = times | kernels_report.report(self.contents, engine, compiled, self.compiler, self.target)
        document = {
            "schema": ENGINE_SCHEMA,
            "bundle": bundle.hash,
            "parvis": __version__,
            "runtime": KERNELS,
            "version": VERSION,
            "target": name,
            "device": device,
            "precision": self.contents.precision,
            "decoder_precision": self.contents.decoder_precision,
            "mode": "shared",
            "images": list(self.images),
            "sampling": SAMPLING,
            "plans": {},
            "decoder": None,
            "kernels": program.to_json(engine),
            "tuned": dict(tuned),
            "report": report,
        }
        sealed = seal(document)
        (folder / ENGINE_JSON).write_text(json.dumps(sealed, separators=(",", ":")))
        Engine.open(folder, bundle)  # what the runtime will check
        stored = f" from {bundle.quantised}" if bundle.quantised else ""
        say(
            f"{bundle.name}: {' and '.join(planned.programs)} for {name}, {len(compiled)} kernels by "
            f"{self.compiler.version}, {self.contents.precision}{stored}, in {times['seconds']:.1f} s, peak memory "
            f"{report['peak_memory_bytes'] / 1e6:.0f} MB"
        )

    def compiled(self, on_step: OnStep) -> tuple[Planned, dict[str, Compiled], float]:
        """The plan, its compiled kernels, and the seconds that compiling took.

        Where the compiler finds no registers or no shared memory for a kernel, it is planned in another shape if it has
        one. Raises BuildError, which names the first kernel that cannot run well on the target.
        """
        refused: Refused = frozenset()
        seconds, why = 0.0, ""
        while True:
            try:
                planned = self.planner(self.contents, self.images, self.target, refused)
            except BuildError:
                if why:  # no other shape is left
                    raise BuildError(why) from None
                raise
            started = time.monotonic()
            compiled = self.compiler.compile(
                planned.specs.values(),
                self.target,
                lambda done, of: on_step(f"{self.target.name}: kernel {done} of {of}", done / of),
            )
            seconds += time.monotonic() - started
            faults = {name: fault for name in planned.specs if (fault := compiled[name].fault(self.target))}
            if not faults:
                return planned, compiled, seconds
            final = [name for name in faults if planned.specs[name] in refused]  # it has no other shape
            name = [*final, *faults][0]
            source = planned.specs[name].source
            why = (
                f"kernel {source} for {self.target.name} by {self.compiler.version} {faults[name]}; build with "
                "--engine tensorrt"
            )
            if final:
                raise BuildError(why)
            refused |= {planned.specs[name] for name in faults}


def sources() -> str:
    """The hash of the sources that decide, beside the bundle and the compiler, what an engine is."""
    return source_hash((kernels, graphs, *MODEL, engine_contents, engine_publish, program))


def described(file: str, spec: Spec, kernel: Compiled) -> Kernel:
    """The entry of a compiled kernel, whose cubin is in ``file``."""
    return Kernel(
        file=file,
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


def write_files(
    folder: Path, planned: Planned, compiled: dict[str, Compiled], compiler: str, decoder_precision: str
) -> Kernels:
    """Write cubins and constants into ``folder``; returns the engine that they and the plan make."""
    entries = {}
    for name, spec in planned.specs.items():
        kernel = compiled[name]
        (folder / f"{name}.cubin").write_bytes(kernel.cubin)
        entries[name] = described(f"{name}.cubin", spec, kernel)
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
