"""The suite ``gpu``: the report of a GPU, which ``par_export.card`` makes, and the engines for it, built ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from par_runtime.backends import cuda
from par_runtime.backends.choose import CPUS
from par_runtime.backends.engines import MOST_BATCH
from par_runtime.bench.gpu import select
from par_runtime.bench.journal import Journal
from par_runtime.bench.measure import Progress
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.baselines import optional
from par_runtime.errors import RequestError

if TYPE_CHECKING:
    from par_runtime.bench.run import BenchOptions

#: What a report can do; the first two are its default. ``docs/gpu.md`` describes each.
KERNELS, SHAPES, PRODUCTS = "kernels", "shapes", "products"
PARTS = ("driver", KERNELS, "baselines", SHAPES, PRODUCTS, "cuda-ort", "tensorrt-rtx")
DEFAULT_PARTS = PARTS[:2]
BUILT_AHEAD = (KERNELS, SHAPES, PRODUCTS)  #: parts that need our kernels
WHAT = "the report of a GPU"


def report(options: BenchOptions, progress: Progress, journal: Journal) -> list[Row]:
    """The report of the GPU of ``--device``. Raises RequestError, CudaError where there is none."""
    gpu = None if options.device in CPUS else select(options.device)
    if gpu is None:
        why = cuda.why_no_device() or f"--device {options.device} is none"
        raise RequestError(f"--suite gpu needs an NVIDIA GPU: {why}")
    make = optional("par_export.card.report", WHAT, "CardOptions")
    card = make(
        device=gpu.index,
        torch=f"cuda:{gpu.index}",
        parts=options.parts or DEFAULT_PARTS,
        minutes=options.seconds / 60,
        models=_models(options.sizes),
        engines=options.engines,
        repetitions=options.repetitions,
        twins=not options.no_eager,
        work=options.work,
        checked=_checked(options),
        **_images(options),
    )
    rows: list[Row] = optional("par_export.card.report", WHAT, "report")(card, gpu, progress, journal)
    return rows


def check_options(options: BenchOptions) -> None:
    """Raise RequestError where ``--from`` or ``--build-for`` stands beside an option that means nothing to it, and for
    batches that no engine is built for.
    """
    if options.suite == "gpu" and options.batches and max(options.batches) > MOST_BATCH:
        raise RequestError(
            f"--batches {max(options.batches)}: expected at most {MOST_BATCH}, the largest batch that engines are "
            "built for"
        )
    measuring = (
        ("--json", options.json),
        ("--compare", options.compare),
        ("--minutes", options.minutes),
        ("--no-eager", options.no_eager),
    )
    if options.build_for is not None:
        if options.engines is None:
            raise RequestError(
                f"--build-for {options.build_for}: give the folder that engines are built into, --engines FOLDER"
            )
        outputs = (("--csv", options.csv), ("--html", options.html), ("--svg", options.svg))
        _refuse(
            "--build-for builds engines and measures nothing", (*measuring, *outputs, ("--from", options.from_files))
        )
        if without := [part for part in options.parts or () if part not in BUILT_AHEAD]:
            raise RequestError(
                f"--parts {without[0]}: it needs no engine of our kernels; --build-for builds those of the parts "
                f"{', '.join(BUILT_AHEAD[:-1])} and {BUILT_AHEAD[-1]}"
            )
    if not options.from_files:
        return
    reading = (("BUNDLE", options.bundles), ("--engines", options.engines), ("--sizes", options.sizes))
    chosen = (("--parts", options.parts), ("--batches", options.batches))
    _refuse("--from measures nothing", (*measuring, *chosen, *reading))


def _refuse(why: str, others: Sequence[tuple[str, object]]) -> None:
    for option, given in others:
        if given:
            raise RequestError(f"{why}, so {option} means nothing to it; leave it out")


def again(options: BenchOptions) -> Outcome:
    """The page of the reports in the files of ``--from``; nothing is measured. Raises RequestError."""
    outcome: Outcome = optional("par_export.card.again", WHAT, "again")(options.from_files)
    return outcome


def build_ahead(options: BenchOptions, say: Callable[[str], None]) -> list[str]:
    """Build the engines of a report into ``--engines`` for ``--build-for``; returns what failed, a line each.

    Raises RequestError, OSError.
    """
    assert options.engines is not None
    try:
        failed: list[str] = optional("par_export.card.ahead", WHAT, "build_ahead")(
            options.engines,
            options.build_for,
            checked=_checked(options),
            samples=optional("par_export.card.samples", WHAT, "SAMPLES"),
            codes=optional("par_export.card.plan", WHAT, "CODES"),
            models=_models(options.sizes),
            parts=options.parts or (KERNELS,),
            work=options.work,
            say=say,
            **_images(options),
        )
    except optional("par_export.errors", WHAT, "BuildError") as error:
        raise RequestError(f"--build-for: {error}") from error
    return failed


def _checked(options: BenchOptions) -> Any:
    """The bundles whose whole images are checked: those that were given, else the checkout's."""
    return options.bundles or optional("par_export.card.report", WHAT, "bundles_to_check")()


def _images(options: BenchOptions) -> dict[str, Any]:
    """The batches of the rows, where they are given."""
    return {} if options.batches is None else {"images": options.batches}


def _models(sizes: Sequence[str] | None) -> list[Any]:
    """The report's models of these names, all for None. Raises RequestError where none has such a name."""
    models = [m for m in optional("par_export.card.plan", WHAT, "MODELS") if m.name in (sizes or (m.name,))]
    if not models:
        raise RequestError(f"--sizes {' '.join(sizes or ())}: no model of --suite gpu")
    return models
