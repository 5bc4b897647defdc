"""From a bundle to a calibrated one: record, quantise, write, compare, publish or not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from par_calibration.errors import CalibrationError
from par_calibration.heldout import find
from par_calibration.places import Places
from par_calibration.quantise import activations
from par_calibration.quantise.choice import GROUP, How, check_groups, kept_names
from par_calibration.quantise.layers import Layers, Quantiser, by_gptq
from par_calibration.record.record import OnDone, RecordOptions, maker_of, plan_of, record
from par_calibration.record.recording import Recording
from par_calibration.refine.plan import Plan
from par_calibration.refine.train import Refined, check_memory, refine, training_device
from par_calibration.report import Budget, LayerError, Options, Report, compare
from par_export.quantised import check_source, write_bundle
from par_export.restored import StoredWeights, stored_table
from par_export.staging import check_place, check_replaced
from par_model.training.files import alone_in
from par_runtime.arguments import cpu_threads
from par_runtime.backends.native.decoding import why_not_bf16
from par_runtime.backends.native.library import why_not
from par_runtime.bundle import WEIGHTS, Bundle, matrix_names
from par_runtime.checked import is_text, shown_path
from par_runtime.dtypes import ARITHMETICS, CACHES, DECODER_PRECISIONS, Float, Rounding
from par_runtime.manifest import KEPT, MOST_NAME
from par_runtime.quantised import Quantised
from par_runtime.request import class_indices
from par_runtime.system import check_different, check_writable, peak_bytes

#: Words of ``--weights`` -> the manifest's.
KEEP_WEIGHTS = "keep"
WEIGHT_CHOICES = ("int8", "int4", KEEP_WEIGHTS)

NOTHING_TO_DO = (
    "--weights keep: changes nothing by itself; give --arithmetic bf16 or int8, --cache bf16, or --decoder-precision "
    "bf16, to prove that the C kernels may round to it"
)

Say = Callable[[str], None]


class OverBudgetError(Exception):
    """The report of a calibration is beyond its budget, so no bundle was written; each line is one measure."""

    def __init__(self, report: Report, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.report, self.lines = report, tuple(lines)

    def __reduce__(self) -> tuple[Any, ...]:  # as OutOfMemory has it
        return type(self), (self.report, self.lines), self.__dict__


@dataclass(frozen=True)
class Request:
    """What ``parvis calibrate`` is asked for."""

    bundle: Path
    weights: str = "int8"  #: one of :data:`WEIGHT_CHOICES`
    out: Path | None = None  #: default: beside the bundle, named after it and what was done
    group: int = GROUP
    keep: tuple[str, ...] = ()
    #: None: bf16 with quantised weights, else what is proven for the bundle; fp32 where the C step does not run it
    arithmetic: str | None = None
    cache: str | None = None  #: as ``arithmetic``
    decoder_precision: str | None = None  #: None: what is proven for the bundle, where it can be proven here; else fp32
    refine: int = 0  #: steps in which codes and scales are trained after that; see ``refine.train``
    record: RecordOptions = field(default_factory=RecordOptions)
    report: Options = field(default_factory=Options)
    budget: str | None = None  #: as ``Budget.parse`` takes it
    work: Path | None = None  #: folder of the recording; default: hidden, beside ``out``, removed at the end
    resume: bool = False
    force: bool = False
    html: Path | None = None  #: default: beside ``out``
    json: Path | None = None
    show_images: Path | None = None
    threads: int | None = None


def places_of(request: Request) -> Places:
    """The places of ``request``. Raises CalibrationError."""
    bundle = request.bundle.absolute()
    bundle = bundle if bundle.name not in ("", "..") else bundle.resolve()
    did = [request.weights]
    if request.weights == KEEP_WEIGHTS:
        rounding = rounding_of(request)
        did = [rounding.arithmetic] * (rounding[:2] != ("fp32", "fp32"))
        did += ["cache"] * (rounding.cache != "fp32") + ["decoder"] * (rounding.decoder_precision != "fp32")
    suffix = "-".join(did)
    out = request.out or request.bundle.parent / f"{bundle.name}-{suffix}"
    if request.out is None and request.bundle.name in ("", ".", ".."):
        out = bundle.parent / f"{bundle.name}-{suffix}"
    if not out.name or out.name == "..":
        raise CalibrationError(f"--out {shown_path(out)}: names no new folder; give the name of one")
    html, json = out.with_name(f"{out.name}.html"), out.with_name(f"{out.name}.json")
    return Places(
        out=out,
        work=request.work or out.parent / f".{bundle.name}.calibration",
        html=request.html or html,
        json=request.json or json,
        images=request.show_images,
        own_work=request.work is None,
        own_files=tuple(own for own, given in ((html, request.html), (json, request.json)) if given is None),
    )


def calibrate(
    request: Request,
    *,
    quantiser: Quantiser = by_gptq,
    say: Say = lambda _: None,
    on_image: OnDone | None = None,
    on_matrix: OnDone | None = None,
    on_step: OnDone | None = None,
) -> tuple[Path, Report]:
    """Do what ``request`` says; returns the bundle and its report.

    ``quantiser`` makes codes and scales of one matrix. ``on_image`` is told how many images are recorded, ``on_matrix``
    how many matrices are quantised, ``on_step`` how many steps of ``refine`` are done.

    Raises OverBudgetError, after the files of the report were written; CalibrationError, BundleError, RequestError,
    ExportError and what else ``write_bundle`` raises, OSError. A recording that is not complete stays for ``resume``.
    """
    started = time.perf_counter()
    request = replace(request, threads=cpu_threads(request.threads))
    bundle = Bundle.open(request.bundle)
    if request.weights == KEEP_WEIGHTS and not (request.arithmetic or request.cache or request.decoder_precision):
        raise CalibrationError(NOTHING_TO_DO)
    asked, request = request, _with_rounding(request, bundle)
    places = places_of(request)
    options = _checked(request, bundle, places)
    errors: list[LayerError] = []
    quantise: Callable[[str, Float], Any] = _nothing
    made: list[Report] = []
    calibration = {
        "weights": KEPT if request.weights == KEEP_WEIGHTS else request.weights,
        "group": 0 if request.weights == KEEP_WEIGHTS else request.group,
        "arithmetic": request.arithmetic,
        "cache": request.cache,
    }
    if request.decoder_precision != "fp32":
        calibration["decoder_precision"] = request.decoder_precision
    for name, before in bundle.rounding()._asdict().items():
        after = getattr(request, name)
        if getattr(asked, name) is None and before not in ("fp32", after):
            say(f"{name.replace('_', ' ')}: {before} was proven for {bundle.path}; the new bundle has {after}")

    def decide(candidate: Bundle) -> Mapping[str, Any]:
        if request.weights != KEEP_WEIGHTS:
            say(f"quantised after {time.perf_counter() - started:.1f} s; the report compares both bundles")
        report = compare(bundle, candidate, options, errors)
        report.write_html(places.html)
        report.write_json(places.json)
        if places.images is not None:
            report.write_images(places.images)
        for line in report.table():
            say(line)
        lines = report.exceeded()
        if lines:
            raise OverBudgetError(report, lines)
        made.append(report)
        return {"report": report.summary() | ({"refined_steps": request.refine} if request.refine else {})}

    with ExitStack() as recordings:
        if request.weights != KEEP_WEIGHTS:
            how, kept = How.of(bundle, request.weights, request.group), kept_names(bundle, request.keep)
            recording = recordings.enter_context(recorded(request, bundle, places, say, on_image))
            if request.refine:
                trained = refined(request, recording, how, kept, quantiser, say, (on_image, on_matrix, on_step))
                quantiser, on_matrix = trained.quantiser, None
            layers = Layers(recording, how, kept, quantiser, on_matrix)
            quantise, errors = layers, layers.errors
        # As an exported bundle, it is named after its folder: otherwise reports and files of both have one name.
        name = places.out.name if is_text(places.out.name, MOST_NAME) else bundle.name
        write_bundle(bundle, places.out, quantise, calibration, force=request.force, decide=decide, say=say, name=name)
    say(
        f"{places.out}: within its budget; report: {places.html} and {places.json}; "
        f"{time.perf_counter() - started:.0f} s, peak memory {(peak_bytes() or 0) / 1e6:.0f} MB"
    )
    return places.out, made[0]


@contextmanager
def recorded(
    request: Request, bundle: Bundle, places: Places, say: Say = lambda _: None, on_image: OnDone | None = None
) -> Iterator[Recording]:
    """The complete recording that ``request`` asks for, made or taken up, for this process alone. At the end it is
    removed, where nobody named its folder and no error came. Raises as :func:`calibrate`.
    """
    began = time.perf_counter()
    recording = Recording(places.work, plan_of(bundle, request.record), bundle)
    with alone_in("--work", places.work, CalibrationError):
        yield _complete(recording, request, began, say, on_image, places.own_work)
        if places.own_work:
            recording.remove()


def _complete(
    recording: Recording, request: Request, began: float, say: Say, on_image: OnDone | None, own: bool
) -> Recording:
    """``recording``, with all its images. ``own``: nobody named its folder, which goes if an error leaves no image."""
    recording.begin(request.resume, again=request.force)
    there = len(recording.done())
    plan = recording.plan
    try:
        by = record(recording, lambda: maker_of(recording.bundle, request.threads), on_image)
    except BaseException:
        if own and not recording.holds_work():
            with suppress(OSError):
                recording.remove()
        raise
    taken = f", {there} of the images were there" if there else ""
    say(
        f"recorded {plan.images} images, {plan.images * plan.rows_per_image} rows of each matrix, "
        f"{recording.bytes_needed() / 1e6:.1f} MB in {recording.folder}, {time.perf_counter() - began:.1f} s"
        f"{''.join(f', {name}' for name in by)}{taken}"
    )
    return recording


def refined(
    request: Request,
    recording: Recording,
    how: How,
    kept: frozenset[str],
    quantiser: Quantiser,
    say: Say,
    on: tuple[OnDone | None, OnDone | None, OnDone | None],
) -> Refined:
    """The matrices of ``quantiser``, trained further; ``on``: told of images, matrices and steps. Raises as
    :func:`calibrate`.
    """
    began = time.perf_counter()
    on_image, on_matrix, on_step = on
    bundle, seed = recording.bundle, request.record.seed
    shapes = _shapes(bundle, kept)
    stored = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))
    start = f"{recording.plan.images} images of {recording.plan.rows_per_image} rows"
    # Of another quantiser the training would be another one.
    start += f" by {getattr(quantiser, '__qualname__', type(quantiser).__qualname__)}"
    plan = Plan.of(bundle, how, kept, request.refine, seed, start, _classes(request, bundle), threads=request.threads)

    def quantised() -> dict[str, Quantised]:
        out = {}
        for done, name in enumerate(shapes, 1):
            out[name] = quantiser(name, stored.tensor(name).float().numpy(), recording.rows(name), how)
            if on_matrix is not None:
                on_matrix(done, len(shapes))
        return out

    trained = refine(bundle, plan, quantised, shapes, recording.folder, say=say, on_image=on_image, on_step=on_step)
    say(f"refined in {plan.steps} steps, {time.perf_counter() - began:.1f} s; {trained.text()}")
    return trained


def _classes(request: Request, bundle: Bundle) -> list[int] | None:
    """The classes of the images that ``--refine`` learns from: those of the recording; None for all."""
    return None if request.record.labels is None else class_indices(bundle, request.record.labels)


def _shapes(bundle: Bundle, kept: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Those of the matrices that are quantised, by name."""
    return {name: tuple(bundle.weights[name].shape) for name in matrix_names(bundle) if name not in kept}


def measured_ranges(
    request: Request, *, say: Say = lambda _: None, on_image: OnDone | None = None
) -> list[activations.Range]:
    """What rounding the rows of every product would cost (``--ranges``); no bundle is written. Raises as
    :func:`calibrate`.
    """
    request = replace(request, threads=cpu_threads(request.threads))
    bundle = Bundle.open(request.bundle)
    check_source(bundle)
    places = places_of(request)
    places.check(bundle.path, [])
    stored = StoredWeights(bundle.path / WEIGHTS, stored_table(bundle))

    def matrix(name: str) -> Float:
        return np.asarray(stored.tensor(name).float().numpy(), np.float32)

    with recorded(request, bundle, places, say, on_image) as recording:
        return activations.ranges(recording, matrix, request.group)


def _nothing(_: str, __: Float) -> None:
    """The ``quantise`` that keeps every matrix."""


def _with_rounding(request: Request, bundle: Bundle) -> Request:
    """``request`` with everything that says what a bundle runs in.

    What was proven before is proven again, so that one proof more loses none. bf16 costs less than quantised weights
    do, which the report shows; in fp32 they would save memory but hardly time.
    """
    proven = bundle.rounding()
    default = Rounding("bf16", "bf16", proven.decoder_precision) if request.weights != KEEP_WEIGHTS else proven
    if why_not(bundle):
        default = Rounding(decoder_precision=default.decoder_precision)
    if default.decoder_precision != "fp32" and why_not_bf16(bundle):
        default = default._replace(decoder_precision="fp32")
    given = {name: getattr(request, name) or getattr(default, name) for name in Rounding._fields}
    return replace(request, **given)


def rounding_of(request: Request) -> Rounding:
    """What the bundle of a ``request`` will run in; fp32 where nothing is said."""
    return Rounding(*(getattr(request, name) or "fp32" for name in Rounding._fields))


def _checked(request: Request, bundle: Bundle, places: Places) -> Options:
    """Everything that can be wrong and is known before any work; returns the options of the report.

    Raises CalibrationError, ExportError, RequestError, OSError.
    """
    for name, value, known in (
        ("weights", request.weights, WEIGHT_CHOICES),
        ("arithmetic", request.arithmetic, ARITHMETICS),
        ("cache", request.cache, CACHES),
        ("decoder-precision", request.decoder_precision, DECODER_PRECISIONS),
    ):
        if value not in known:
            raise CalibrationError(f"--{name} {value}: expected one of {', '.join(known)}")
    check_source(bundle)
    budget = KEPT if request.weights == KEEP_WEIGHTS else request.weights
    limits = Budget.parse(request.budget, budget) if request.budget is not None else Budget.of(budget)
    inputs = (request.report.real, None if request.budget is None else Budget.file_of(request.budget))
    places.check(bundle.path, [path for path in inputs if path is not None])
    places.check_own_files()
    if request.weights == KEEP_WEIGHTS:
        if rounding_of(request) == Rounding():
            raise CalibrationError(NOTHING_TO_DO)
        if request.refine:
            raise CalibrationError("--refine: no matrix is quantised with --weights keep; leave it out")
        if request.keep:
            raise CalibrationError("--keep: every matrix is kept with --weights keep; leave it out")
    else:
        how, kept = How.of(bundle, request.weights, request.group), kept_names(bundle, request.keep)
        check_groups(bundle, how, kept)
        if request.refine:
            Plan.of(bundle, how, kept, request.refine, request.record.seed, "")
            check_memory(bundle, _shapes(bundle, kept), training_device())
    reason = why_not(bundle)
    if reason and (request.arithmetic, request.cache) != ("fp32", "fp32"):
        raise CalibrationError(
            f"--arithmetic {request.arithmetic}, --cache {request.cache}: they are the C step's, which cannot run this "
            f"bundle here ({reason}), so nothing could be proven; leave them out"
        )
    reason = why_not_bf16(bundle) if request.decoder_precision != "fp32" else None
    if reason:
        raise CalibrationError(
            f"--decoder-precision {request.decoder_precision}: nothing could be proven of it here, because {reason}; "
            "leave it out"
        )
    check_place(places.out)
    if os.path.lexists(places.out):
        check_replaced(places.out, request.force)
    if request.report.real is not None and not request.report.real.exists():
        raise CalibrationError(
            f"--real {request.report.real}: no such file or folder; give a folder of pictures or a file of tokens"
        )
    if places.images is not None and places.images.suffix.lower() != ".png":
        raise CalibrationError(f"--show-images {shown_path(places.images)}: expected a name that ends in .png")
    if places.images is not None and (request.report.samples_of(bundle) == 0 or bundle.image_size is None):
        raise CalibrationError(
            f"--show-images {shown_path(places.images)}: there will be no images, as --generated is 0 or the bundle "
            "ends at tokens; leave it out"
        )
    check_different([*places.files, places.out / "bundle", places.work / "recording"])
    for path in places.files:
        check_writable(path)
    for option, path, ending in (("--html", places.html, ".html"), ("--json", places.json, ".json")):
        if os.path.lexists(path) and path.suffix.lower() != ending:  # a picture, perhaps
            raise CalibrationError(
                f"{option} {shown_path(path)}: exists and has another ending than {ending}; give another name, "
                "so that it is not lost"
            )
    # Encoded before hours of work, since a picture among them may be none.
    held = find(bundle, request.report.real, request.report.images_of(bundle))
    return replace(
        request.report,
        held=held,
        arithmetic=request.arithmetic,
        cache=request.cache,
        decoder_precision=request.decoder_precision,
        threads=request.threads,
        budget=limits,
    )
