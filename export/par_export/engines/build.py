"""Bundle to engine: TensorRT plans of the step network and the decoder, with a report, in the bundle's folder.

``shared`` (default): one plan of q = n serves every phase; sequential steps are padded, since a step of n positions
costs a GPU the same as a step of one. ``per-phase``: a plan for each, which holds the weights three times. Needs onnx
and TensorRT, but neither torch nor a GPU (with TensorRT-RTX). See ``docs/engines.md``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from par_export import engines, graphs
from par_export.engines import report as engine_report
from par_export.engines.builder import OnStep, Target, build_plan, check_target, uninterrupted
from par_export.engines.contents import decoder_weights, step_config, step_weights, tokenizer_config
from par_export.engines.network import ExpectedAttention
from par_export.engines.place import place
from par_export.engines.publish import MODEL, cache_of, check_images, publish, source_hash
from par_export.engines.request import MODES, BuildRequest, local_gpu
from par_export.engines.weights import MappedWeights, weights_in
from par_export.errors import BuildError
from par_export.fp16 import check_build
from par_export.graphs import video
from par_export.graphs.decoder import decoder_graph
from par_export.graphs.sampling import why_not_searched
from par_export.graphs.step import Form, step_graph
from par_export.graphs.vq import PREFIX
from par_export.graphs.writer import Graph
from par_model.config import VideoTokenizerConfig
from par_runtime import __version__
from par_runtime.backends.engines import ENGINE_JSON, ENGINE_SCHEMA
from par_runtime.backends.tails import TAILS, Tail, least_tail, why_not_drawn
from par_runtime.backends.trt import module as trt_module
from par_runtime.backends.trt.module import TensorRT
from par_runtime.bundle import WEIGHTS, Bundle, seal
from par_runtime.dtypes import DTYPE
from par_runtime.system import peak_bytes, sha256


def build(
    request: BuildRequest,
    say: Callable[[str], None] = print,
    on_step: OnStep = lambda *_: None,
    trt: TensorRT | None = None,
) -> Path:
    """Build the engine of ``request``, or take it from the cache; returns its folder.

    ``say`` receives lines of text for the user, ``on_step`` the builder's progress. ``trt`` is the TensorRT to build
    with (default: the installed one). Raises BuildError, BuildCancelledError, OutputError, BundleError,
    TensorRTMissingError, OSError.
    """
    _check_request(request)
    trt = tensorrt_for(request.target, trt)
    bundle = Bundle.open(request.bundle, verify="full")
    folder_of_engines = place(bundle, request.out, say)
    cache = cache_of(request, say)
    request = replace(request, use_cache=cache is not None)
    checked = _CheckedRequest.of(bundle, request, trt)
    name = f"{trt.name}-{trt.version}-{checked.target.lower()}-{checked.precision}" + (
        "" if request.mode == "shared" else f"-{request.mode}"
    )
    if request.label:
        name += f"-{request.label}"
    out = folder_of_engines / name
    publish(out, bundle, cache, checked.ingredients(), lambda folder: checked.write(folder, say, on_step), say)
    report = json.loads((out / ENGINE_JSON).read_text())["report"]
    for line in engine_report.table(report):
        say(line)
    return out


def tensorrt_for(target: str, trt: TensorRT | None = None) -> TensorRT:
    """``trt``, or the installed TensorRT, that builds for ``target``. Raises TensorRTMissingError; BuildError where it
    does not.
    """
    if trt is None:  # only TensorRT-RTX builds for another GPU than this machine's
        trt = trt_module.load(None if target == "local" else trt_module.RTX)
    check_target(trt, Target.of(target))
    return trt


def tail_of(own: str | None, vocab: int, top_k: int, top_p: float) -> Tail:
    """The sampling tail of a plan, where none is asked for: that of the bundle's static graphs (``own``); another one
    where that does not draw with the bundle's own settings."""
    for tail in TAILS:
        if tail == own and why_not_drawn(tail, vocab, top_k, top_p) is None:
            return tail
    return least_tail(vocab, top_k, top_p)


def _check_request(request: BuildRequest) -> None:
    if request.precision is not None and request.precision not in DTYPE:
        raise BuildError(f"precision {request.precision!r}; expected one of {', '.join(DTYPE)}")
    if request.mode not in MODES:
        raise BuildError(f"engines {request.mode!r}; expected one of {', '.join(MODES)}")
    if request.sampling is not None and request.sampling not in TAILS:
        raise BuildError(f"sampling {request.sampling!r}; plans are built with one of {', '.join(TAILS)}")
    check_images(request.images)


@dataclass(frozen=True)
class _CheckedRequest:
    """A checked request with every default filled in: all that decides what the build makes."""

    request: BuildRequest
    bundle: Bundle
    trt: TensorRT
    precision: str
    target: str
    device: str | None
    sampling: Tail
    queries: dict[str, tuple[int, tuple[str, ...]]]  #: plan name -> positions per call, phases it serves

    @staticmethod
    def of(bundle: Bundle, request: BuildRequest, trt: TensorRT) -> _CheckedRequest:
        """Fill in what the request leaves to the bundle. Raises BuildError."""
        phases = {phase.name: phase.query for phase in bundle.phases}
        n = bundle.group_size
        if request.mode == "shared":
            queries = {"step": (n, tuple(phases))}
        else:
            serves = {"prefill": ("prefill", "sequential"), "transition": ("transition",), "group": ("group",)}
            queries = {}
            for name, wanted in serves.items():
                served = tuple(phase for phase in wanted if phase in phases)
                if served:
                    queries[name] = (max(phases[phase] for phase in served), served)
        target, device = (request.target.upper(), None) if request.target != "local" else local_gpu()
        own, d = bundle.graphs["group"].sampling, bundle.defaults
        sampling = request.sampling or tail_of(own, bundle.vocab_size, d.top_k, d.top_p)
        if why := why_not_searched(sampling, bundle.vocab_size):
            raise BuildError(f"{bundle.path}: {why}")
        precision = request.precision or bundle.precision
        check_build(bundle.parity, DTYPE[precision], DTYPE[request.decoder_precision])
        return _CheckedRequest(request, bundle, trt, precision, target, device, sampling, queries)

    def form(self, query: int) -> Form:
        """The form of the graph of ``query`` positions. Raises BuildError where this TensorRT cannot run it."""
        default = Form.of(query)
        has_lengths = hasattr(self.trt.module.IAttention, "key_value_lengths")
        lengths = self.request.lengths if self.request.lengths is not None else default.lengths and has_lengths
        if lengths and not has_lengths:
            raise BuildError(f"{self.trt.name} {self.trt.version} has no attention by lengths; give --visible mask")
        grouped = default.grouped if self.request.grouped is None else self.request.grouped and query > 1
        return Form(grouped, lengths, self.request.norm_after)

    def ingredients(self) -> dict[str, Any]:
        """All that decides what the build makes, as plain values: the key of the engine cache."""
        r = self.request
        return {
            "bundle": self.bundle.hash,
            "parvis": __version__,
            "schema": ENGINE_SCHEMA,
            "runtime": [self.trt.name, self.trt.version, self.target, self.device],
            "precision": [self.precision, r.decoder_precision],
            "images": list(r.images),
            "plans": {name: [q, list(p), *vars(self.form(q)).items()] for name, (q, p) in self.queries.items()},
            "sampling": self.sampling,
            "graphs": source_hash((graphs, engines, *MODEL)),
        }

    def write(self, folder: Path, say: Callable[[str], None], on_step: OnStep) -> None:
        """Build every plan into ``folder`` and describe them in ``engine.json``."""
        started = time.monotonic()
        config, d = step_config(self.bundle), self.bundle.defaults
        draws = why_not_drawn(self.sampling, self.bundle.vocab_size, d.top_k, d.top_p)
        if draws is not None:
            say(
                f"warning: --sampling {self.sampling} {draws}; the bundle's own settings are top-k {d.top_k}, top-p "
                f"{d.top_p:g}, so each request must give others"
            )
        stored = step_weights(self.bundle)
        compute = DTYPE[self.precision]
        plans: dict[str, Any] = {}
        reports: dict[str, Any] = {}
        fold = self.request.norm_after
        with weights_in(self.bundle.path / WEIGHTS, stored, compute, folder, fold=fold) as (table, data):
            weights_bytes = sum(entry.length for entry in table.entries.values())
            for name, (query, phases) in self.queries.items():
                form = self.form(query)
                graph = step_graph(
                    config, table, name=name, compute=compute, query=query, sampling=self.sampling, form=form
                )
                attention = ExpectedAttention(config.n_layers, form.lengths, decomposable=self.precision == "fp32")
                file, report = self._build_plan(
                    folder, name, graph, data, attention, config.n_layers, weights_bytes, on_step
                )
                plans[name] = {"file": file.name, "bytes": file.stat().st_size, "query": query, "phases": list(phases)}
                reports[name] = report | {"form": vars(form)}
        decoder = None
        if self.bundle.image_size is not None:
            decoder = self._build_decoder(folder, reports, on_step)
        for entry in [*plans.values(), *([decoder] if decoder else [])]:
            entry["sha256"] = sha256(folder / entry["file"])
        document = {
            "schema": ENGINE_SCHEMA,
            "bundle": self.bundle.hash,
            "parvis": __version__,
            "runtime": self.trt.name,
            "version": self.trt.version,
            "target": self.target,
            "device": self.device,
            "precision": self.precision,
            "decoder_precision": self.request.decoder_precision,
            "mode": self.request.mode,
            "images": list(self.request.images),
            "sampling": self.sampling,
            "plans": plans,
            "decoder": decoder,
            "tuned": {},
            "report": {
                "plans": reports,
                "seconds": round(time.monotonic() - started, 2),
                "peak_memory_bytes": peak_bytes(),
            },
        }
        (folder / ENGINE_JSON).write_text(json.dumps(seal(document), indent=1))
        say(
            f"{self.bundle.name}: {', '.join([*plans, *(['decoder'] if decoder else [])])} for {self.target} with "
            f"{self.trt.name} {self.trt.version}, {self.precision}, sampling {self.sampling}, "
            f"in {time.monotonic() - started:.1f} s, peak memory "
            f"{(peak_bytes() or 0) / 1e6:.0f} MB"
        )

    def _build_decoder(self, folder: Path, reports: dict[str, Any], on_step: OnStep) -> dict[str, Any]:
        """Build the decoder's plan, put its report into ``reports``; returns its entry of ``engine.json``."""
        vq = tokenizer_config(self.bundle)
        compute = DTYPE[self.request.decoder_precision]
        stored = decoder_weights(self.bundle, vq)
        with weights_in(self.bundle.path / WEIGHTS, stored, compute, folder) as (table, data):
            config = step_config(self.bundle)
            graph = (
                video.decoder_graph(config, vq, table, compute)
                if isinstance(vq, VideoTokenizerConfig)
                else decoder_graph(config, vq, table, compute)
            )
            size = sum(entry.length for key, entry in table.entries.items() if key.startswith(PREFIX))
            file, reports["decoder"] = self._build_plan(folder, "decoder", graph, data, None, 0, size, on_step)
        return {"file": file.name, "bytes": file.stat().st_size, "query": 0, "phases": []}

    def _build_plan(
        self,
        folder: Path,
        name: str,
        graph: Graph,
        data: MappedWeights,
        attention: ExpectedAttention | None,
        layers: int,
        weights_bytes: int,
        on_step: OnStep,
    ) -> tuple[Path, dict[str, Any]]:
        """Build the plan ``name`` of ``graph`` into ``folder``; returns its file and its report."""
        file = folder / f"{name}.plan"
        timing = None
        if self.request.use_cache and self.request.cache_folder is not None:
            name_of_cache = f"timing-{self.trt.name}-{self.trt.version}-{self.device or self.target}.cache"
            timing = self.request.cache_folder / name_of_cache
        clock = time.monotonic()
        with file.open("wb") as out, uninterrupted() as signals:
            outcome = build_plan(
                self.trt,
                graph,
                data,
                Target.of(self.request.target),
                self.request.images,
                lambda piece: out.write(piece),
                attention=attention,
                allow_tf32=attention is None,
                timing_cache=timing,
                reproducible=self.request.reproducible,
                on_step=lambda phase, fraction: on_step(f"{name}: {phase}", fraction),
                signals=signals,
            )
        outcome.seconds = time.monotonic() - clock
        counted = engine_report.kernels(outcome.log, self.request.images, layers)
        if attention is not None and not attention.decomposable and self.trt.rtx:
            for profile in counted:
                if profile.attention != layers:
                    raise BuildError(
                        f"{name}: {profile.attention} of {layers} attention layers are fused at {profile.images} "
                        f"images; {self.trt.name} {self.trt.version} has no kernel for head size "
                        f"{self.bundle.cache.head_dim}"
                    )
        return file, engine_report.plan_report(outcome, counted, layers, file.stat().st_size, weights_bytes)
