"""``parvis bench``: how fast a bundle is here, against what, and how far from what the hardware allows."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from par_runtime.backends.choose import CPUS
from par_runtime.backends.engines import has_engines
from par_runtime.bench import machine, rows
from par_runtime.bench.gpu import COPY_BYTES, Gpu, copy_gb_s, describe
from par_runtime.bench.limits import Limits, measure_cpu, sizes
from par_runtime.bench.measure import Say, Setting, bounded, image_ms
from par_runtime.bench.report import compare, page, text
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Shape
from par_runtime.bench.subjects.eager import one_at_a_time
from par_runtime.bench.subjects.process import Apart, open_bundle, open_eager
from par_runtime.bench.suites import basic as suites
from par_runtime.bench.suites import paper, paper_run, serve
from par_runtime.bench.suites.paper import PaperRow
from par_runtime.bundle import Bundle
from par_runtime.cli.bench_options import parser
from par_runtime.cli.common import guarded
from par_runtime.cost import bound
from par_runtime.cost.bound import DATA_SHEETS, Prediction, predictions
from par_runtime.errors import RequestError
from par_runtime.system import available_bytes, available_cores, check_writable, write_beside

#: A baseline in PyTorch whose image takes longer is estimated from some of its calls, unless --whole.
LONG_SECONDS = 20.0
PROBE_CALLS = 16


@dataclass
class Outcome:
    """Everything that one command found out."""

    rows: list[Row]
    predictions: list[Prediction]
    paper: list[PaperRow]
    compared: compare.Comparison | None = None


def bench(argv: Sequence[str]) -> int:
    """Measure; exit code 0, 1 where --fail-above was passed, 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: _bench(args))


main = bench


def _bench(args: argparse.Namespace) -> int:
    check(args)
    old = None if args.compare is None else rows.read(args.compare)
    with _speaker(args.quiet) as say:
        if old is not None and not args.bundles and args.suite != "paper":
            outcome = Outcome(rows.read(args.against_file), [], [])
        elif args.suite == "paper":
            outcome = _paper(args, say)
        else:
            outcome = _bundles(args, say)
    if old is not None:
        outcome.compared = compare.compare(old, outcome.rows)
    _write(args, outcome)
    if outcome.compared is None or args.fail_above is None:
        return 0
    slower = _slower(outcome.compared, args.fail_above)
    if not outcome.compared.pairs:
        print("parvis: --fail-above: no row has its pair in the other file, so nothing was compared", file=sys.stderr)
        return 1
    for what in slower:
        print(f"parvis: slower than --fail-above {args.fail_above:g}: {what}", file=sys.stderr)
    return 1 if slower else 0


def check(args: argparse.Namespace) -> None:
    """Everything about the arguments that can be known before work begins. Raises RequestError, OSError."""
    args.against_file = None
    if args.compare is not None and args.suite != "paper" and len(args.bundles) == 1 and args.bundles[0].is_file():
        args.against_file, args.bundles = args.bundles[0], []
    elif not args.bundles and args.suite != "paper":
        raise RequestError(
            "no bundle was given; expected one or more folders made by 'parvis export', --suite paper (which needs none), or "
            "--compare OLD.jsonl NEW.jsonl"
        )
    for name in ("images", "repetitions", "threads", "requests"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name} {value}: expected 1 or more")
    if args.threads is not None and args.threads > available_cores():
        raise RequestError(
            f"--threads {args.threads}: this process may use {available_cores()} cores; expected no more than these"
        )
    if not args.minutes > 0:
        raise RequestError(f"--minutes {args.minutes:g}: expected more than 0")
    if args.fail_above is not None and (args.compare is None or not args.fail_above > 0):
        raise RequestError(f"--fail-above {args.fail_above:g}: expected a ratio above 0, and --compare OLD.jsonl")
    outputs = [path for path in (args.json, args.csv, args.html) if path is not None]
    if outputs.count(Path("-")) > 1:
        raise RequestError(
            "'-' is standard output, and takes one of --json, --csv and --html; give files for the others"
        )
    if len(set(outputs)) < len(outputs):
        raise RequestError("--json, --csv and --html name one file twice; give each its own")
    for path in outputs:
        if path != Path("-"):
            check_writable(path)


# -- given bundles ------------------------------------------------------------------------------------------------------


def _bundles(args: argparse.Namespace, say: Say) -> Outcome:
    """The suite on the bundles of the command line and on their baselines."""
    with ExitStack() as held:
        subjects = list(_opened(args, held, say))
        facts = {subject.facts.label: subject.facts for subject in subjects}
        limits = _limits(args, subjects, say)
        setting = Setting(args.suite, args.images, not args.unguided, args.repetitions, {}, _gpu(args))
        if not args.whole:
            setting = replace(setting, most_calls=dict(_long(subjects, setting, say)))
        rows = _suite(args, subjects, setting, say)
        again = _limits(args, subjects, say)
    rows = bounded(rows, facts, {threads: found.better(again[threads]) for threads, found in limits.items()})
    found = [
        one
        for its in {f.hash: f for f in facts.values() if "torch" not in f.backend}.values()
        for one in predictions(its.shape, its.bundle, its.n, args.images, not args.unguided)
    ]
    return Outcome(rows, [] if args.no_limits else found, [])


def _suite(args: argparse.Namespace, subjects: Sequence[Apart], setting: Setting, say: Say) -> list[Row]:
    if args.suite == "batch":
        return suites.batch(subjects, setting, say, args.batches)
    if args.suite == "decoder":
        return suites.decoder(subjects, setting, say, args.batches)
    if args.suite == "serve":
        largest = max(args.batches) if args.batches else serve.LARGEST_BATCH
        return serve.serve(subjects, setting, say, largest, args.requests, 60 * args.minutes)
    return suites.phases(subjects, setting, say)


def _opened(args: argparse.Namespace, held: ExitStack, say: Say) -> Iterator[Apart]:
    """The bundles, then their baselines, each in a process that ``held`` ends."""
    labels = labels_of(args.bundles)
    for path, label in zip(args.bundles, labels, strict=True):
        say(f"{label}: loading")
        given = Bundle.open(path)
        subject = open_bundle(path, label, device=args.device, threads=args.threads, selftest=trained(given))
        held.callback(subject.close)
        if subject.note and has_engines(given) and not args.quiet:
            print(f"parvis: {subject.note}", file=sys.stderr)
        yield subject
    for baseline in args.against:
        for path, label in zip(args.bundles, labels, strict=True):
            name = baseline if len(labels) == 1 else f"{label} {baseline}"
            say(f"{name}: loading")
            device = "cpu" if args.device in ("auto", *CPUS) else "cuda"
            if baseline == "n1":
                folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir=args.work, prefix="parvis-bench-")))
                twin = one_at_a_time(path, folder)
                on = args.device if args.device in CPUS else "cpu"
                subject = open_bundle(twin, name, device=on, threads=args.threads, selftest=False)
            elif baseline == "ort":
                tested = trained(Bundle.open(path, "none"))
                subject = open_bundle(path, name, device="cpu-ort", threads=args.threads, selftest=tested)
            else:
                subject = open_eager(path, name, threads=args.threads, compiled=baseline == "compiled", device=device)
            held.callback(subject.close)
            yield subject


def trained(bundle: Bundle) -> bool:
    """Whether it has a self-test to pass; one of random weights has none."""
    return bool(bundle.selftest["labels"])


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each bundle: "parvis" for the only one, else the folders' names, told apart by a number."""
    if len(paths) == 1:
        return ["parvis"]
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def _long(subjects: Sequence[Apart], setting: Setting, say: Say) -> Iterator[tuple[str, int]]:
    """Baselines in PyTorch whose image would take long, and how many calls of it take :data:`LONG_SECONDS`."""
    for subject in subjects:
        if "torch" in subject.facts.backend and setting.suite in ("phases", "batch"):
            label = subject.facts.label
            say(f"{label}: how long an image takes")
            seconds = image_ms(subject.run(setting.images, setting.guided, PROBE_CALLS), subject.facts) / 1e3
            if seconds > LONG_SECONDS:
                yield label, max(PROBE_CALLS, int(subject.facts.shape.calls * LONG_SECONDS / seconds))


# -- the paper's tables -------------------------------------------------------------------------------------------------


def _paper(args: argparse.Namespace, say: Say) -> Outcome:
    """The paper's rows, with bundles of the command line in the places of their models."""
    given = {}
    for path in args.bundles:
        bundle = Bundle.open(path, "none")
        shape = Shape.of_model(bundle.model, bundle.phases)
        model = paper.VIDEO if bundle.grid[0] > 1 else bound.model_name(shape)
        if model not in paper.SIZES or bundle.group_size not in paper_run.GROUP_SIZES:
            raise RequestError(
                f"{path}: {model}, n = {bundle.group_size}, is in no row of the paper's tables; expected one of "
                f"{', '.join(paper.SIZES)} with n = 1, 4 or 16; --suite phases measures any bundle"
            )
        given[model, bundle.group_size] = path
    gpu = _gpu(args)
    device = "cpu" if args.device == "auto" and gpu is None else str(args.device)
    threads = args.threads or available_cores()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="parvis-bench-") as work:
        say("this machine's limits")
        limits = _cpu_limits(threads, [10**9]) if gpu is None else _gpu_limits(gpu)
        key = threads if gpu is None else 0
        setting = Setting("paper", 1, not args.unguided, args.repetitions, {}, gpu)
        options = paper_run.Options(
            args.minutes, args.sizes or paper.SIZES, Path(work), not args.no_eager, device, args.threads, given
        )
        rows, facts, left_out = paper_run.run(setting, limits, options, say)
        if gpu is None:
            say("this machine's limits, once more")
            limits = limits.better(_cpu_limits(threads, [10**9]))
    rows = bounded(rows, facts, {key: limits})
    where = machine.facts(gpu)
    name = where.gpu or f"{where.cpu}, {threads} thread{'s' if threads > 1 else ''}"
    placed = paper.placed(rows, left_out, limits, name, not args.unguided)
    return Outcome(rows, paper.predicted(not args.unguided), placed)


# -- limits -------------------------------------------------------------------------------------------------------------


def _limits(args: argparse.Namespace, subjects: Sequence[Apart], say: Say) -> dict[int, Limits]:
    """What the device allows, by number of threads; 0 is the GPU."""
    if args.no_limits:
        return {}
    out: dict[int, Limits] = {}
    guided = not args.unguided
    for threads in {s.facts.threads for s in subjects if s.facts.threads is not None}:
        say(f"this machine's limits with {threads} threads")
        works = [
            bound.working_bytes(f.shape, args.images, guided, f.weight_bytes, f.cache_bytes)
            for f in (s.facts for s in subjects)
            if f.threads == threads
        ]
        out[threads] = _cpu_limits(threads, works)
    gpu = _gpu(args)
    if gpu is not None and any(s.facts.threads is None for s in subjects):
        out[0] = _gpu_limits(gpu)
    return out


def _cpu_limits(threads: int, works: Sequence[int]) -> Limits:
    cache = machine.facts().cache_bytes
    return measure_cpu(threads, sizes(works, cache, available_bytes()))


def _gpu_limits(gpu: Gpu) -> Limits:
    """Bandwidth measured by copies; the matrix peak by data sheet, where the GPU is known (else only bandwidth bounds)."""
    rate = copy_gb_s(gpu.index)
    known = [sheet for name, sheet in DATA_SHEETS.items() if name.split("-")[0] in gpu.name]
    peak = known[0].tflop_s if known else None
    how = f"measured: copies of {COPY_BYTES / 1e6:.0f} MB on the device; " + (
        "matrices by data sheet" if known else "no matrix peak known for this GPU"
    )
    return Limits(((COPY_BYTES, rate),), peak, how)


def _gpu(args: argparse.Namespace) -> Gpu | None:
    """The GPU that --device names, or the first where there is one and "auto" may take it."""
    if args.device in CPUS:
        return None
    from par_runtime.backends import cuda

    index = int(args.device.partition(":")[2] or 0)
    if args.device == "auto" and cuda.device_count() == 0:
        return None
    return describe(index)


# -- what is told -------------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, outcome: Outcome) -> None:
    """Files as asked for; the table on standard output unless something else is written there."""
    html = args.html is not None and page.page(outcome.rows, outcome.predictions, outcome.paper, outcome.compared)
    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (args.json, lambda: _json_lines(outcome)),
        (args.csv, lambda: text.csv_text(outcome.rows)),
        (args.html, lambda: str(html)),
    ]
    silent = args.quiet
    for path, make in outputs:
        if path == Path("-"):
            sys.stdout.write(make())
            silent = True
        elif path is not None:
            content = make()
            write_beside(path, lambda part, content=content: part.write_text(content, encoding="utf-8"))  # type: ignore[misc]
    if silent:
        return
    parts = []
    if outcome.paper:
        found = [p for p in outcome.predictions if p.n in (1, 4, 16)]
        parts += ["\n".join(paper.notes(outcome.paper)), paper.paper_table(outcome.paper)]
        parts += ["\n".join(text.about(outcome.rows))] if outcome.rows else []
        parts += [paper.predicted_table(found)]
    elif args.bundles:
        parts += [text.table(outcome.rows)]
        parts += [text.predicted_table(outcome.predictions)] if outcome.predictions else []
    if outcome.compared is not None:
        parts += [compare.text(outcome.compared)]
    print("\n\n".join(parts))
    for path in (args.json, args.csv, args.html):
        if path is not None:
            print(f"\nwritten: {path}")


def _json_lines(outcome: Outcome) -> str:
    lines = [rows.to_json(row) for row in outcome.rows]
    lines += [json.dumps(paper.as_dict(row)) for row in outcome.paper]
    if outcome.paper:
        lines += [json.dumps({"kind": "predicted"} | vars(one)) for one in outcome.predictions]
    return "".join(line + "\n" for line in lines)


def _slower(found: compare.Comparison, limit: float) -> list[str]:
    return [f"{compare.what(p.new)}: {p.ratio:.3f}" for p in found.pairs if p.low > limit]


@contextmanager
def _speaker(quiet: bool) -> Iterator[Say]:
    """Says what is being done on stderr, in one line that is written over; silent when asked or not on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    width = 0

    def say(text: str) -> None:
        nonlocal width
        sys.stderr.write(f"\r{text[:100].ljust(width)}")
        sys.stderr.flush()
        width = len(text[:100])

    try:
        yield say
    finally:
        sys.stderr.write(f"\r{' ' * width}\r")
