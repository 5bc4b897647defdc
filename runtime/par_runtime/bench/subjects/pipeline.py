"""A bundle on its backend as a subject: ``Pipeline.generate`` itself makes the images, and its backend is timed.

:class:`TimedBackend` stands between the pipeline and its backend and takes the time of every call. What lies between
two calls is the host's part, "copy". So the phases are those of production code, and their sum is the image, except
for what the clock itself costs. A backend on a GPU makes a whole image in one launch, whose parts cannot be timed from
outside. There the phases are timed in a second run (``engine.py``), and "image" is the launch.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.base import Backend, BackendInfo, Batch, MakesImages
from par_runtime.bench.subjects.base import Sample, SubjectInfo, TooManyImagesError, spread_calls
from par_runtime.bundle import Bundle, Phase
from par_runtime.cost.architecture import Architecture, model_name
from par_runtime.dtypes import AUTO, Float, Int, Rounding
from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule
from par_runtime.selftest import LOAD_SECONDS
from par_runtime.system import available_cores, peak_bytes

GUIDANCE = 4.0  #: of guided images where the bundle's default is unguided
NOT_IN_A_START = ("writing files",)
NOT_TIMED = ("loading the bundle", *NOT_IN_A_START)


class TimedBackend:
    """A backend whose calls are timed: ``calls_ms`` by phase, and "copy" for what lies between them."""

    def __init__(self, backend: Backend, phases: tuple[Phase, ...]) -> None:
        self._backend, self._phases = backend, phases
        self.info, self.max_images, self.tie = backend.info, backend.max_images, backend.tie
        self.calls_ms: dict[str, list[float]] = {}
        self._last = 0.0

    def begin(self) -> None:
        """Start the clock: a batch begins."""
        self.calls_ms = {}
        self._last = time.perf_counter()

    def end(self) -> None:
        """Stop the clock: the batch is done."""
        self._add("copy", time.perf_counter())

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """``Backend.step``, timed."""
        self._add("copy", time.perf_counter())
        tokens = self._backend.step(batch, ids, write, uniform)
        self._add(phase_at(self._phases, int(write[0])), time.perf_counter())
        return tokens

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        """``Backend.logits``, not timed."""
        return self._backend.logits(batch, ids, write)

    def release(self, cache_rows: Int | None = None) -> None:
        """``Backend.release``, not timed."""
        self._backend.release(cache_rows)

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        """``Backend.decode``, timed."""
        self._add("copy", time.perf_counter())
        images = self._backend.decode(tokens)
        self._add("decoder", time.perf_counter())
        return images

    def close(self) -> None:
        """``Backend.close``."""
        self._backend.close()

    def _add(self, phase: str, now: float) -> None:
        """The time since the last event belongs to ``phase``."""
        self.calls_ms.setdefault(phase, []).append(1e3 * (now - self._last))
        self._last = now


def phase_at(phases: tuple[Phase, ...], write: int) -> str:
    """The phase of the call at input position ``write``."""
    return next(p.name for p in reversed(phases) if p.repeat and p.start <= write)


class PipelineSubject:
    """A bundle on a backend, in this process."""

    def __init__(
        self, pipeline: Pipeline, label: str, load_ms: float | None = None, selftest_ms: float | None = None
    ) -> None:
        self.pipeline, self.load_ms, self.selftest_ms = pipeline, load_ms, selftest_ms
        self.info = subject_info(pipeline, label)
        self.note = pipeline.note
        self._seed = 0

    @staticmethod
    def load(
        path: Path,
        label: str,
        *,
        device: str = "cpu",
        threads: int | None = None,
        selftest: bool = True,
        rounding: Rounding = AUTO,
    ) -> PipelineSubject:
        """Load the bundle and run its self-test, both timed. Raises what ``Pipeline.load`` raises."""
        began = time.perf_counter()
        pipeline = Pipeline.load(path, device, threads=threads, selftest=False, **rounding._asdict())
        loaded = time.perf_counter()
        selftest_ms = None
        if selftest:  # the speed of a backend that makes wrong images means nothing
            pipeline.selftest(LOAD_SECONDS)  # as Pipeline.load does
            selftest_ms = 1e3 * (time.perf_counter() - loaded)
        return PipelineSubject(pipeline, label, 1e3 * (loaded - began), selftest_ms)

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Make one batch, or some of its calls; see ``Subject.run``."""
        if self.info.clock != "perf_counter":
            from par_runtime.bench.subjects.engine import phases_ms

            calls_ms = phases_ms(self.pipeline, self._labels(images), self._guidance(guided))
            began = time.perf_counter()
            self._generate(self.pipeline, images, guided)
            return Sample(calls_ms, 1e3 * (time.perf_counter() - began), peak_bytes())
        timed = TimedBackend(self.pipeline.backend, self.pipeline.bundle.phases)
        pipeline = replace(self.pipeline, backend=timed)
        chosen = spread_calls(self.pipeline.bundle.phases, most_calls)
        began = time.perf_counter()
        timed.begin()
        if chosen is None:
            self._generate(pipeline, images, guided)
        else:
            self._some_calls(pipeline, chosen, images, guided)
        timed.end()
        return Sample(timed.calls_ms, 1e3 * (time.perf_counter() - began), peak_bytes(), chosen is not None)

    def image(self, images: int, guided: bool) -> Sample:
        """Make one batch as production does, timed as a whole: no clock between its calls, and on a GPU no graph that
        only a measurement needs, which would count to the first image of a process.
        """
        began = time.perf_counter()
        self._generate(self.pipeline, images, guided)
        return Sample({}, 1e3 * (time.perf_counter() - began), peak_bytes())

    def _some_calls(self, pipeline: Pipeline, chosen: frozenset[int], images: int, guided: bool) -> None:
        """Make these calls of a batch, and decode it. Keys of the calls left out are zeros, which cost the same."""
        bundle = pipeline.bundle
        each = image_settings(bundle, images, guidance=self._guidance(guided), guidance_interval=-1)
        self._seed += 1
        seeds = [self._seed * images + i for i in range(images)]
        schedule = Schedule.of(bundle, self._labels(images), each, seeds)
        tokens = np.zeros((images, bundle.n_tokens), np.int64)
        pipeline.backend.release()
        for index, (call, batch, ids, write) in enumerate(schedule.walk(tokens)):
            if index in chosen:
                tokens[:, call.positions] = pipeline.backend.step(batch, ids, write, schedule.noise[:, call.positions])
        pipeline.backend.release()  # so that the next batch begins with a short window
        if bundle.image_size is not None:
            pipeline.decode(tokens)

    def decode(self, images: int) -> Sample:
        """Decode random tokens, nothing else. Raises RequestError where the bundle ends at tokens."""
        bundle = self.pipeline.bundle
        self._seed += 1
        tokens = np.random.default_rng(self._seed).integers(0, bundle.vocab_size, (images, bundle.n_tokens))
        timed = TimedBackend(self.pipeline.backend, bundle.phases)
        began = time.perf_counter()
        timed.begin()
        replace(self.pipeline, backend=timed).decode(tokens)
        took = 1e3 * (time.perf_counter() - began)
        return Sample({"decoder": timed.calls_ms["decoder"]}, took, peak_bytes())

    def first_preview_ms(self, images: int, guided: bool) -> float:
        """Milliseconds until the first picture that shows something of every region: after the first n tokens.

        Raises RequestError where the bundle ends at tokens.
        """
        began = time.perf_counter()
        seen: list[float] = []
        phases = self.pipeline.bundle.phases
        calls = max(1, sum(p.repeat for p in phases if p.name in ("prefill", "sequential")))

        class Stop(Exception):  # noqa: N818, it is no error
            pass

        def show(pictures: NDArray[np.uint8], done: int, total: int) -> None:
            seen.append(1e3 * (time.perf_counter() - began))
            raise Stop  # only the first preview is measured

        with suppress(Stop):
            self._generate(self.pipeline, images, guided, preview_every=calls, on_preview=show)
        return seen[0]

    def close(self) -> None:
        """Close the pipeline."""
        self.pipeline.close()

    def _generate(self, pipeline: Pipeline, images: int, guided: bool, **options: object) -> None:
        self._seed += 1
        pipeline.generate(
            self._labels(images),
            guidance=self._guidance(guided),
            guidance_interval=-1,  # the bounds are those of images that are guided to the end
            seed=self._seed * images,
            max_batch=images,
            **options,  # type: ignore[arg-type]
        )

    def _labels(self, images: int) -> list[int]:
        info, most = self.pipeline.backend.info, self.pipeline.backend.max_images
        if images > most:
            raise TooManyImagesError(f"{images} images at once (--images, --batches): {info.name} takes at most {most}")
        return [i % self.pipeline.bundle.n_classes for i in range(images)]

    def _guidance(self, guided: bool) -> float:
        return guidance_scale(self.pipeline.bundle) if guided else 1.0


def guidance_scale(bundle: Bundle) -> float:
    """The guidance scale of guided images: the bundle's default, or :data:`GUIDANCE`."""
    return bundle.defaults.guidance if bundle.defaults.guidance > 1 else GUIDANCE


def subject_info(pipeline: Pipeline, label: str) -> SubjectInfo:
    """The info of a loaded pipeline under the name ``label``."""
    bundle, info = pipeline.bundle, pipeline.backend.info
    in_one_launch = isinstance(pipeline.backend, MakesImages)
    architecture = Architecture.of(bundle)
    return SubjectInfo(
        **bundle_info(bundle, architecture),
        label=label,
        computes=info.computes,
        weight_bytes=info.weight_bytes,
        cache_bytes=info.cache_bytes,
        backend=info.runtime,
        version=info.version,
        decoder=info.decoder,
        decoder_computes=info.decoder_computes,
        decoder_bf16=_bf16_left_out(bundle, info),
        device=info.device,
        threads=None if in_one_launch else pipeline.threads or available_cores(),
        architecture=architecture,
        clock="CUDA events" if in_one_launch else "perf_counter",
        excluded=(*NOT_TIMED, "the host's launches, in the phases") if in_one_launch else NOT_TIMED,
    )


def _bf16_left_out(bundle: Bundle, info: BackendInfo) -> str:
    """How the C decoder could compute in bf16, where it decodes in fp32; else ""."""
    if not info.decoder.startswith("native") or info.decoder_computes != "fp32":
        return ""
    from par_runtime.backends.native.decoding import bf16_form_of  # it asks Linux for AMX, so only where it decodes

    return bf16_form_of(bundle)


def bundle_info(bundle: Bundle, architecture: Architecture) -> dict[str, Any]:
    """The fields of :class:`SubjectInfo` that come from the bundle, on any backend."""
    return {
        "bundle": bundle.name,
        "hash": bundle.hash,
        "model": model_name(architecture),
        "parameters": bundle.model["parameters"],
        "n": bundle.group_size,
        "grid": bundle.grid,
        "precision": bundle.precision,
        "weights": bundle.quantised or "",
        "image_size": bundle.image_size,
        "sampling": sampling_text(bundle),
    }


def sampling_text(bundle: Bundle) -> str:
    """The sampling settings of the measured images, as text: the bundle's defaults."""
    d = bundle.defaults
    return f"guidance {guidance_scale(bundle):g}, temperature {d.temperature:g}, top-k {d.top_k}, top-p {d.top_p:g}"
