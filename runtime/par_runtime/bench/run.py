"""One command of ``parvis bench``: open the subjects, measure the limits of the device, run a suite.

The command line is ``cli/bench.py``; what is printed and written is ``report/output.py``.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from par_runtime.batcher import MOST_WAITING
from par_runtime.bench import machine, rows
from par_runtime.bench.bounds import GPU, Gauge, with_bounds
from par_runtime.bench.gpu import select
from par_runtime.bench.journal import Journal
from par_runtime.bench.measure import Progress, Setting, image_ms, process_ids
from par_runtime.bench.opening import Opened, open_subjects
from par_runtime.bench.outputs import check_outputs
from par_runtime.bench.report import compare
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Subject, SubjectInfo
from par_runtime.bench.subjects.served import ServedSubject
from par_runtime.bench.suites import batch, decoder, http, paper, paper_run, phases, serve, start
from par_runtime.bench.suites import gpu as gpu_suite
from par_runtime.bundle import Bundle
from par_runtime.cost.data_sheets import Prediction, predictions
from par_runtime.dtypes import BYTES, Rounding
from par_runtime.errors import RequestError
from par_runtime.request import MOST_OF_A_COMMAND
from par_runtime.system import available_cores

MOST_REQUESTS = 10**6  #: of a load
SUITES = ("phases", "batch", "decoder", "serve", "http", "start", "paper", "gpu")
OF_THEIR_OWN = ("paper", "gpu")  #: suites that bring their models and baselines
#: The time of a suite that has one, where --minutes is not given.
MINUTES, GPU_MINUTES = 10.0, 8.0
BASELINES = ("eager", "compiled", "n1", "ort")
#: Those of them that a suite takes where it does not take all, and why it takes no others.
TAKEN = {
    "start": (
        ("ort",),
        "--suite start takes ort alone, the same bundle on ONNX Runtime; PyTorch loads no bundle, and the random "
        "weights of n1 have no self-test",
    ),
    "http": (("n1", "ort"), "--suite http takes n1 and ort, which are bundles; 'parvis serve' runs no PyTorch"),
}
#: A baseline in PyTorch whose image takes longer is estimated from some of its calls, unless ``whole``.
LONG_SECONDS = 20.0
PROBE_CALLS = 16


@dataclass(frozen=True)
class BenchOptions:
    """The options of ``parvis bench``, named as on its command line; ``parvis bench --help`` describes them.

    ``new``: the second file of ``--compare OLD NEW``, which :meth:`checked` finds among ``bundles``.
    """

    bundles: Sequence[Path]
    suite: str
    against: Sequence[str]
    images: int
    unguided: bool
    repetitions: int
    batches: Sequence[int] | None
    requests: int | None
    minutes: float | None
    sizes: Sequence[str] | None
    no_eager: bool
    whole: bool
    json: Path | None
    csv: Path | None
    html: Path | None
    compare: Path | None
    fail_above: float | None
    no_limits: bool
    device: str
    threads: int | None
    work: Path | None
    quiet: bool
    engines: Path | None = None
    build_for: str | None = None
    parts: Sequence[str] | None = None
    from_files: Sequence[Path] = ()
    svg: Path | None = None
    arithmetic: str = "auto"
    cache: str = "auto"
    decoder_precision: str = "auto"
    new: Path | None = None

    @property
    def guided(self) -> bool:
        """Two rows per image instead of one."""
        return not self.unguided

    @property
    def rounding(self) -> Rounding:
        """What a CPU rounds to."""
        return Rounding(self.arithmetic, self.cache, self.decoder_precision)

    @property
    def seconds(self) -> float:
        """The time of a suite that has one."""
        default = GPU_MINUTES if self.suite == "gpu" else MINUTES
        return 60 * (default if self.minutes is None else self.minutes)

    def checked(self) -> BenchOptions:
        """The options after every check that is possible before work begins. Raises RequestError, OSError."""
        for option, given, suites in (
            ("--batches", self.batches, ("batch", "decoder", "serve", "http", "gpu")),
            ("--sizes", self.sizes, OF_THEIR_OWN),
            ("--no-eager", self.no_eager, OF_THEIR_OWN),
            ("--engines", self.engines, ("gpu",)),
            ("--build-for", self.build_for, ("gpu",)),
            ("--parts", self.parts, ("gpu",)),
            ("--from", self.from_files, ("gpu",)),
            ("--svg", self.svg, ("gpu",)),
            ("--requests", self.requests, ("serve", "http")),
            ("--minutes", self.minutes is not None, ("serve", "http", *OF_THEIR_OWN)),
            ("--whole", self.whole, ("phases", "batch")),
            ("--against", self.against, tuple(suite for suite in SUITES if suite not in OF_THEIR_OWN)),
        ):
            if given and self.suite not in suites:
                raise RequestError(f"{option} is for --suite {' or '.join(suites)}, and means nothing to {self.suite}")
        options = self
        if self.compare is not None and len(self.bundles) == 1 and _is_of_rows(self.bundles[0]):
            options = replace(self, new=self.bundles[0], bundles=())
        elif not self.bundles and self.suite not in OF_THEIR_OWN:
            raise RequestError(
                "no bundle was given; expected one or more folders made by 'parvis export', --suite paper or gpu "
                "(which need none), or --compare OLD.jsonl NEW.jsonl"
            )
        taken, why = TAKEN.get(self.suite, (BASELINES, ""))
        if others := [baseline for baseline in self.against if baseline not in taken]:
            raise RequestError(f"--against {' '.join(others)}: {why}")
        for name in ("images", "repetitions", "threads", "requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: expected 1 or more")
        if self.images is not None and self.images > MOST_OF_A_COMMAND:
            raise RequestError(f"--images {self.images}: expected at most {MOST_OF_A_COMMAND}, which are made at once")
        if self.requests is not None and self.requests > MOST_REQUESTS:
            raise RequestError(f"--requests {self.requests}: expected at most {MOST_REQUESTS}")
        if self.suite == "http" and self.batches and max(self.batches) > MOST_WAITING:
            raise RequestError(
                f"--batches {max(self.batches)}: expected at most {MOST_WAITING} clients, as many as may wait there"
            )
        if self.threads is not None and self.threads > available_cores():  # they would wait for each other
            options = replace(options, threads=available_cores())
        if not 0 < self.seconds < math.inf:
            raise RequestError(f"--minutes {self.minutes:g}: expected a finite number above 0")
        if self.engines is not None and self.build_for is None and not self.engines.is_dir():
            raise RequestError(f"--engines {self.engines}: no such folder; expected one with a folder for each bundle")
        if self.fail_above is not None and (self.compare is None or not self.fail_above > 0):
            raise RequestError(f"--fail-above {self.fail_above:g}: expected a ratio above 0, and --compare OLD.jsonl")
        gpu_suite.check_options(self)
        check_outputs(
            {"json": self.json, "csv": self.csv, "html": self.html, "svg": self.svg},
            self.compare,
            options.new,
            self.from_files,
        )
        return options


def _is_of_rows(path: Path) -> bool:
    """Whether a path that is given for a bundle is meant as a file of rows: no folder, but there, or named like one."""
    return not path.is_dir() and (path.exists() or path.suffix in (".jsonl", ".json"))


def run_bench(options: BenchOptions, progress: Progress, warn: Callable[[str], None], journal: Journal) -> Outcome:
    """Measure what checked ``options`` ask for, or read their file of rows, and compare with the earlier run, if any.

    ``warn`` is given each warning as a line; ``journal`` keeps the rows meanwhile, and has what was measured if this
    raises, and the subjects that failed while others went on. Raises BundleError, RequestError, CudaError, OSError,
    MemoryError.
    """
    old = None if options.compare is None else rows.read(options.compare)

    def with_comparison(outcome: Outcome) -> Outcome:
        outcome.compared = None if old is None else compare.compare(old, outcome.rows)
        return outcome

    if options.new is not None:
        return with_comparison(Outcome(rows.read(options.new), [], [], measured=False))
    if options.from_files:
        return gpu_suite.again(options)
    if options.suite == "gpu":
        made = gpu_suite.report(options, progress, journal)
        of_report = journal.finish
        journal.finish = lambda made: with_comparison(of_report(made))
    elif options.suite == "paper":
        made = _run_paper(options, progress, journal, with_comparison)
    else:
        made = _run_bundles(options, progress, warn, journal, with_comparison)
    outcome = journal.finish(made)
    if journal.failed:
        outcome.stopped = f"{', '.join(journal.failed)} failed"
    return outcome


# -- given bundles ----------------------------------------------------------------------------------------------------


def _run_bundles(
    options: BenchOptions,
    progress: Progress,
    warn: Callable[[str], None],
    journal: Journal,
    with_comparison: Callable[[Outcome], Outcome],
) -> list[Row]:
    """The suite on the given bundles and on their baselines."""
    with ExitStack() as opened:
        subjects = list(open_subjects(options, opened, progress, warn))
        infos = {subject.info.label: subject.info for subject in subjects}
        gpu = select(options.device)
        no_limits = options.no_limits or options.suite == "http"  # whose rows have no bound
        gauge = Gauge.of(
            [] if no_limits else list(infos.values()),
            _batches(options),
            options.guided,
            gpu,
            progress,
            tuple(pid for subject in subjects for pid in process_ids(subject)),
        )
        no_image = no_limits or options.suite == "start"  # what other GPUs allow is of images
        predicted = [] if no_image else _predictions(options, list(infos.values()))
        journal.finish = lambda made: with_comparison(Outcome(with_bounds(made, infos, gauge.limits()), predicted, []))
        gauge.measure()
        setting = Setting(
            options.suite,
            options.images,
            options.guided,
            options.repetitions,
            gpu=gpu,
            between=gauge.between,
            keep=journal.keep,
            failed=journal.failed,
        )
        if not options.whole:
            setting = replace(setting, most_calls=dict(_long_baselines(subjects, setting, progress)))
        made = _run_suite(options, subjects, setting, progress)
        gauge.after()
    return made


def _predictions(options: BenchOptions, infos: Sequence[SubjectInfo]) -> list[Prediction]:
    """What other GPUs allow each bundle, once, with its weights as they are stored."""
    opened = [Bundle.open(path, "none") for path in options.bundles]
    stored = {bundle.hash: bundle.weight_bytes for bundle in opened}
    by_bundle = {info.hash: info for info in reversed(infos) if not info.pytorch}
    out: list[Prediction] = []
    for info in reversed(by_bundle.values()):
        name = info.bundle if len(options.bundles) == 1 else info.label
        number = BYTES[info.precision]
        weight = stored.get(info.hash, number)  # the n1 baseline is not one of the bundles that were given
        out += predictions(info.architecture, name, info.n, options.images, options.guided, weight, number)
    return out


def _batches(options: BenchOptions) -> Sequence[int]:
    """The batch sizes that the suite runs."""
    if options.suite == "batch":
        return options.batches or batch.BATCHES
    if options.suite == "serve":
        return range(1, _largest_batch(options) + 1)
    return [options.images]


def _largest_batch(options: BenchOptions) -> int:
    return max(options.batches) if options.batches else serve.LARGEST_BATCH


def _run_suite(options: BenchOptions, subjects: Sequence[Opened], setting: Setting, progress: Progress) -> list[Row]:
    if options.suite == "batch":
        return batch.batch(subjects, setting, progress, options.batches)
    if options.suite == "decoder":
        return decoder.decoder(subjects, setting, progress, options.batches)
    if options.suite == "serve":
        return serve.serve(
            subjects, setting, progress, _largest_batch(options), options.requests or serve.REQUESTS, options.seconds
        )
    if options.suite == "http":
        served = [subject for subject in subjects if isinstance(subject, ServedSubject)]
        requests = options.requests or http.REQUESTS
        return http.http(served, setting, progress, options.batches or http.CLIENTS, requests, options.seconds)
    if options.suite == "start":
        return start.start(subjects, setting, progress)
    return phases.phases(subjects, setting, progress)


def _long_baselines(subjects: Sequence[Subject], setting: Setting, progress: Progress) -> Iterator[tuple[str, int]]:
    """The labels of PyTorch's subjects whose image would take long, and how many calls take :data:`LONG_SECONDS`."""
    for subject in subjects:
        if subject.info.pytorch and setting.suite in ("phases", "batch"):
            label = subject.info.label
            progress(f"{label}: how long an image takes")
            seconds = image_ms(subject.run(setting.images, setting.guided, PROBE_CALLS), subject.info) / 1e3
            if seconds > LONG_SECONDS:
                yield label, max(PROBE_CALLS, int(subject.info.architecture.calls * LONG_SECONDS / seconds))


# -- the paper's tables -----------------------------------------------------------------------------------------------


def _run_paper(
    options: BenchOptions,
    progress: Progress,
    journal: Journal,
    with_comparison: Callable[[Outcome], Outcome],
) -> list[Row]:
    """The paper's rows, with the given bundles in the places of their models."""
    end = time.monotonic() + options.seconds
    given = paper_run.given_bundles(options.bundles)
    gpu = select(options.device)
    device = "cpu" if options.device == "auto" and gpu is None else options.device
    threads = options.threads or available_cores()
    key = threads if gpu is None else GPU
    infos: dict[str, SubjectInfo] = {}
    left_out: dict[str, str] = {}
    this_machine = machine.describe(gpu)
    name = this_machine.gpu or f"{this_machine.cpu}, {threads} thread{'s' if threads > 1 else ''}"
    predicted = paper.predicted(options.guided)
    gauge = Gauge({threads: [10**9]} if gpu is None else {}, gpu, progress, until=end)

    def finish(made: Sequence[Row]) -> Outcome:
        limits = gauge.limits()
        bounded = with_bounds(made, infos, limits)
        allowed = limits.get(key)
        device = f"{name} (limits in doubt: {allowed.doubt})" if allowed is not None and allowed.doubt else name
        placed = paper.paper_rows(bounded, left_out, allowed, device, options.guided)
        return with_comparison(Outcome(bounded, predicted, placed))

    journal.finish = finish
    with tempfile.TemporaryDirectory(dir=options.work, prefix="parvis-bench-") as work:
        gauge.measure()
        setting = Setting(
            "paper",
            1,
            options.guided,
            options.repetitions,
            gpu=gpu,
            between=gauge.between,
            keep=journal.keep,
            failed=journal.failed,
        )
        sizes = options.sizes or paper.SIZES
        left = max(0.0, end - gauge.took_s - time.monotonic())  # one more measurement of the limits follows
        paper_options = paper_run.PaperOptions(
            left / 60, sizes, Path(work), not options.no_eager, device, options.threads, given, end
        )
        made = paper_run.run(setting, gauge.limits()[key], paper_options, progress, infos, left_out)
        gauge.after()
    return made
