"""Two bundles, measured against each other: one is loaded at a time, through the runtime alone."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_calibration.heldout import HeldOut, find
from par_calibration.report import measures
from par_calibration.report.budget import Budget
from par_calibration.report.forced import Stream, against, positions_of, record, stream_bytes
from par_calibration.report.frechet import Features, distance, floor
from par_calibration.report.layers import LayerError
from par_calibration.report.measures import Drawn, Frechet
from par_calibration.report.options import Options
from par_calibration.report.result import BOTH, ROUNDING, WEIGHTS, Report, Side
from par_calibration.report.sheet import shown_pairs
from par_runtime.bundle import WEIGHTS as WEIGHTS_FILE
from par_runtime.bundle import Bundle
from par_runtime.dtypes import BYTES, Int, Rounding
from par_runtime.metrics import psnr_db
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings, class_indices
from par_runtime.tokenizer import Tokenizer

T = TypeVar("T")
FP32 = "fp32"
GENERATED_SEEDS = 10_000  #: from ``--seed`` to the first generated image of a report
MOST_SEED = 2**62
OTHER_SEEDS = 1_000_000  #: from the seeds of generated images to those of tokens that stand in for real images
LEAST_SAMPLES = 8  #: of generated images, for a distance of sets
DECODED = 32  #: held-out images that both decoders decode, at most
MOST_DB = 100.0  #: of a PSNR: that of equal images is infinite, which JSON cannot hold
EXACT = Rounding()


def compare(
    original: Bundle, candidate: Bundle, options: Options | None = None, layers: Sequence[LayerError] = ()
) -> Report:
    """Measure ``candidate`` against the bundle that it was made from.

    The original always runs in fp32. The candidate runs in the precisions of ``options`` (default: what its manifest
    says) and, where its step does not run in fp32, in fp32 too. Raises CalibrationError, BundleError, RequestError,
    OSError.
    """
    options = options or Options()
    if candidate.n_tokens != original.n_tokens or candidate.model != original.model:
        raise CalibrationError(
            f"{candidate.path} is no calibration of {original.path}: their models differ; give the bundle that it was "
            "made from"
        )
    rounding = candidate.rounding(Rounding(*(getattr(options, name) or "auto" for name in Rounding._fields)))
    with tempfile.TemporaryDirectory(prefix="parvis-report-", dir=options.scratch) as scratch:
        return _Measuring(original, candidate, options, rounding, Path(scratch)).run(tuple(layers))


@dataclass
class _Sets:
    """Tokens [M,N] of generated images: the original's with two series of seeds, the candidate's with the second."""

    first: Int
    second: Int
    candidate: Int | None = None


@dataclass
class _Measuring:
    original: Bundle
    candidate: Bundle
    options: Options
    rounding: Rounding
    scratch: Path

    @property
    def rounded(self) -> bool:
        """Whether the candidate's step runs in another arithmetic than weights alone are measured in."""
        return (self.rounding.arithmetic, self.rounding.cache) != (FP32, FP32)

    def run(self, layers: tuple[LayerError, ...]) -> Report:
        """Measure everything, one pipeline in memory at a time: the original on given tokens, which are kept as they
        come, and its images; the candidate on the same tokens in fp32, then as it is to run, and its images.

        ``layers``: the errors of single matrices, which were measured before. Raises CalibrationError, RequestError,
        BundleError, OSError.
        """
        notes: list[str] = []
        guidance = self.options.guidance
        if guidance is None:
            guidance = self.original.defaults.guidance
        samples = self.options.samples_of(self.original)
        classes = class_indices(self.original, list(self.options.labels)) or list(range(self.original.n_classes))
        labels = tuple(classes[i % len(classes)] for i in range(samples))
        count = self.options.images_of(self.original)
        given = self.options.held or find(self.original, self.options.real, count)
        if given is not None and len(given) < count:
            notes.append(f"Only {len(given)} held-out images were there; {count} were asked for.")
        self._check_room(count if given is None else len(given))
        if self.rounding != EXACT:  # before an hour of the original's work, not after it
            with _loaded(self.candidate, self.rounding, self.options.threads):
                pass
        stream, other = Stream(self.scratch), Stream(self.scratch)
        try:
            with _loaded(self.original, EXACT, self.options.threads) as pipeline:
                backend = pipeline.backend.info.name
                held = given or self._drawn_instead(pipeline, count, notes)
                self._time("original, given tokens", lambda: record(pipeline, held, stream, self._say))
                sets = self._draw_both(pipeline, labels, guidance) if samples else None
            forced = {}
            if self.rounded:
                with _loaded(self.candidate, EXACT, self.options.threads) as pipeline:
                    [forced[WEIGHTS]] = self._time(
                        "candidate in fp32, given tokens",
                        lambda: against(pipeline, held, [stream], guidance, self._say, keep=other),
                    )
            with _loaded(self.candidate, self.rounding, self.options.threads) as pipeline:
                streams = [stream, other] if self.rounded else [stream]
                results = self._time(
                    "candidate, given tokens", lambda: against(pipeline, held, streams, guidance, self._say)
                )
                forced |= dict(zip((BOTH, ROUNDING), results, strict=False))
                if sets is not None:
                    sets.candidate = self._draw(pipeline, labels, guidance, len(labels))
                candidate_backend = pipeline.backend.info.name
        finally:
            stream.close()
            other.close()
        where = positions_of(self.original)
        agreements = [one for cost, each in forced.items() for one in measures.agreement(each, cost, where)]
        drawn, frechet, pairs = self._generated(sets, labels, notes)
        if not layers:
            notes.append("The error of each layer was not measured: no activations were recorded.")
        weights = self.candidate.quantised or "kept"
        return Report(
            original=_side(self.original, EXACT, backend),
            candidate=_side(self.candidate, self.rounding, candidate_backend),
            images=len(held),
            images_from=held.source,
            real=held.real,
            guidance=guidance,
            seed=self.seed,
            agreements=tuple(agreements),
            profiles={cost: tuple(each.kl.mean(0).tolist()) for cost, each in forced.items()},
            likelihoods={cost: measures.likelihood(each, self.options.seed) for cost, each in forced.items()},
            layers=layers,
            decoder_psnr=self._decoder_psnr(held),
            drawn=drawn,
            frechet=frechet,
            labels=labels,
            notes=tuple(notes),
            budget=self.options.budget or Budget.of(weights),
            pairs=pairs,
            pair_names=tuple(
                f"{_class_name(self.original, label)}, seed {self.seed + samples + i}"
                for i, label in enumerate(labels[: 0 if pairs is None else len(pairs)])
            ),
        )

    def _drawn_instead(self, pipeline: Pipeline, count: int, notes: list[str]) -> HeldOut:
        """Tokens that the original draws, in the place of real images."""
        labels = [i % self.original.n_classes for i in range(count)]
        # Unguided and unfiltered, so that they come of the distribution whose likelihood is compared.
        made = pipeline.generate(
            labels,
            Settings(guidance=1.0, temperature=1.0, top_k=0, top_p=1.0),
            seed=self.seed + OTHER_SEEDS,
            decode=False,
        )
        notes.append(
            "No real images: the bundle holds none and --real names none. Tokens that the original model drew stand "
            "in, so the likelihood says how well the candidate predicts the original, not images."
        )
        return HeldOut(made.tokens, tuple(labels), "tokens that the original model drew", real=False)

    def _draw_both(self, pipeline: Pipeline, labels: tuple[int, ...], guidance: float) -> _Sets:
        first = self._draw(pipeline, labels, guidance, 0)
        return _Sets(first, self._draw(pipeline, labels, guidance, len(labels)))

    @property
    def seed(self) -> int:
        """Of the first generated image: far from those whose activations were recorded with the same ``--seed``."""
        return self.options.seed % MOST_SEED + GENERATED_SEEDS

    def _draw(self, pipeline: Pipeline, labels: tuple[int, ...], guidance: float, offset: int) -> Int:
        seed = self.seed + offset
        return self._time(
            "images", lambda: pipeline.generate(list(labels), guidance=guidance, seed=seed, decode=False).tokens
        )

    def _generated(
        self, sets: _Sets | None, labels: tuple[int, ...], notes: list[str]
    ) -> tuple[Drawn | None, Frechet | None, NDArray[np.uint8] | None]:
        """Tokens until the first divergence, the distance of the sets, and pairs of images to look at."""
        if sets is None or sets.candidate is None:
            notes.append("No images were generated: no divergence and no distance of sets.")
            return None, None, None
        drawn = measures.drawn(sets.second, sets.candidate)
        if self.original.image_size is None:
            notes.append("The bundle ends at tokens: there are no images, and no distance of sets.")
            return drawn, None, None
        if self.original.video:
            notes.append(
                f"Every image of this report is a clip of {self.original.frames} frames; of a pair the first, the "
                "middle and the last frame are shown."
            )
        show = min(self.options.show, len(sets.second))
        features = self._features(len(sets.second), notes)
        if features is None and not show:
            return drawn, None, None
        found, shown = [], []
        with self._decoders() as (exact, rounded):
            every = ((exact, sets.first), (exact, sets.second), (rounded, sets.candidate))
            for decoder, tokens in every if features is not None else every[1:]:
                images = decoder.decode(tokens if features is not None else tokens[:show])
                if features is not None:
                    found.append(features.of(images))
                shown.append(images[:show].copy())  # a view would keep all of them
        pairs = shown_pairs(*shown[-2:]) if show else None
        if features is None:
            return drawn, None, pairs
        first, second, candidate = found
        mean, p95 = floor(first, second, labels, self.options.seed)
        frechet = Frechet(
            features=features.name,
            images=len(first),
            distance=distance(first, candidate),
            other_seeds=distance(first, second),
            same_seeds=distance(second, candidate),
            floor=mean,
            floor_p95=p95,
        )
        return drawn, frechet, pairs

    def _decoder_psnr(self, held: HeldOut) -> float | None:
        """PSNR of the worst of the first held-out images in the precision of the candidate's decoder, against fp32."""
        if self.rounding.decoder_precision == FP32:
            return None
        with self._decoders() as decoders:

            def least() -> float:
                found = [MOST_DB]
                for tokens in held.tokens[:DECODED]:
                    each = [decoder.decode(tokens) for decoder in decoders]
                    # Frame by frame, since the mean of a clip hides one.
                    frames = (images.reshape(-1, *images.shape[-3:]) for images in each)
                    found += map(psnr_db, *frames)
                return min(found)

            return self._time("decoders", least)

    @contextmanager
    def _decoders(self) -> Iterator[tuple[Tokenizer, Tokenizer]]:
        """The decoder, whose weights are those of both bundles: in fp32, and as the CPU that rounds the most has it."""
        with closing(Tokenizer(self.candidate, self.options.threads, FP32)) as exact:
            if self.rounding.decoder_precision == FP32:
                yield exact, exact
                return
            precision, threads = self.rounding.decoder_precision, self.options.threads
            # A bundle is proven for every CPU, so also for one that rounds more than this one does.
            with closing(Tokenizer(self.candidate, threads, precision, least_exact=True)) as rounded:
                yield exact, rounded

    def _features(self, samples: int, notes: list[str]) -> Features | None:
        if "encoder" not in self.original.graphs:
            notes.append("The bundle has no encoder, so there are no features for a distance of generated sets.")
            return None
        if samples < LEAST_SAMPLES or min(self.original.grid[1:]) < 2:
            notes.append(f"No distance of sets from {samples} images; it takes {LEAST_SAMPLES}.")
            return None
        return Features(self.original, self.options.threads)

    def _check_room(self, images: int) -> None:
        """Raise CalibrationError where the logits of so many images do not fit on the disk of temporary files."""
        needed = (1 + self.rounded) * stream_bytes(self.original, images)
        free = shutil.disk_usage(self.scratch).free
        if needed > free:
            raise CalibrationError(
                f"the logits of {images} images take {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free in "
                f"{self.scratch.parent}; compare fewer held-out images, or set TMPDIR to another disk"
            )

    def _say(self, text: str) -> None:
        self.options.say(f"report: {text}")

    def _time(self, what: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        out = work()
        self._say(f"{what}, {time.perf_counter() - began:.1f} s")
        return out


@contextmanager
def _loaded(bundle: Bundle, rounding: Rounding, threads: int | None) -> Iterator[Pipeline]:
    """The bundle on the CPU, closed at the end. Its self-test is left out: a comparison is stricter.

    Raises CalibrationError where the CPU's backend cannot compute so: figures of another arithmetic prove nothing.
    """
    arithmetic, cache, decoder_precision = rounding
    with Pipeline.load(bundle.path, "cpu", threads=threads, selftest=False, **rounding._asdict()) as pipeline:
        info = pipeline.backend.info
        wanted = [arithmetic] if info.computes != arithmetic and arithmetic != FP32 else []
        wanted += [f"a {cache} cache"] if cache != FP32 and info.cache_bytes != BYTES[cache] else []
        if wanted:
            raise CalibrationError(
                f"{' and '.join(wanted)}: {info.name} computes in {info.computes} with a cache of {info.cache_bytes:g} "
                "bytes a number, so the report would prove nothing for it; calibrate where the C step runs (see "
                f"'parvis doctor'), or give --arithmetic {info.computes}{'' if cache == FP32 else ' --cache fp32'}"
            )
        if info.decoder_computes != decoder_precision:
            raise CalibrationError(
                f"a decoder in {decoder_precision}: {info.decoder} computes in {info.decoder_computes}, so the report "
                "would prove nothing for it; calibrate where the C decoder takes bf16 (see 'parvis doctor'), or give "
                "--decoder-precision fp32"
            )
        yield pipeline


def _side(bundle: Bundle, rounding: Rounding, backend: str) -> Side:
    made = bundle.calibration
    return Side(
        name=bundle.name,
        hash=bundle.hash,
        weights=bundle.stored,
        group=made.group if made else 0,
        kept=made.kept if made else (),
        **rounding._asdict(),
        megabytes=bundle.files[WEIGHTS_FILE]["bytes"] / 1e6,
        backend=backend,
    )


def _class_name(bundle: Bundle, label: int) -> str:
    return bundle.class_names[label].split(", ")[0] if bundle.class_names else f"class {label}"
