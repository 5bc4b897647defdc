"""``parvis bench``: how fast a bundle is on this machine, compared with baselines and with the hardware's limits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from par_runtime.bench.journal import Journal
from par_runtime.bench.measure import Progress, no_progress
from par_runtime.bench.report import compare, output
from par_runtime.bench.run import BASELINES, SUITES, BenchOptions, run_bench
from par_runtime.bench.suites.gpu import BUILT_AHEAD, DEFAULT_PARTS, PARTS, build_ahead
from par_runtime.bench.suites.http import CLIENTS
from par_runtime.bench.suites.http import REQUESTS as REQUESTS_OVER_HTTP
from par_runtime.bench.suites.paper import SIZES
from par_runtime.bench.suites.serve import REQUESTS
from par_runtime.cli.common import Help, Parser, fail, guarded, printable
from par_runtime.cli.options import add_arithmetic, add_list, add_threads, path
from par_runtime.errors import OutputsError
from par_runtime.system import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit code 0, 1 if a row is slower than --fail-above or a check of a GPU failed, 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "--images, --batches")


def run(args: argparse.Namespace) -> int:
    """Measure what the parsed ``args`` ask for. Raises what ``run_bench`` raises."""
    options = BenchOptions(**vars(args)).checked()
    if options.build_for is not None:
        failed = build_ahead(options, say_nothing if options.quiet else say)
        return fail(f"{len(failed)} engines were not built: {'; '.join(failed)}") if failed else 0

    def warn(text: str) -> None:
        if not options.quiet:
            print(printable(f"parvis: {text}"), file=sys.stderr)

    if options.threads != args.threads:
        warn(f"--threads {args.threads}: reduced to {options.threads}, the cores that this process may use")
    journal = Journal(None if options.json == output.STANDARD_OUTPUT else options.json, warn)
    try:
        with progress_line(options.quiet) as progress:
            outcome = run_bench(options, progress, warn, journal)
    except BaseException as error:  # Ctrl-C and signals too
        save(options, journal, error)
        raise
    try:
        files = {"json": options.json, "csv": options.csv, "html": options.html, "svg": options.svg}
        output.write(outcome, quiet=options.quiet, **files)
    except (OSError, OutputsError):
        if journal.part is not None and journal.part.exists():
            print(f"parvis: rows that were written before are in {journal.part}", file=sys.stderr)
        raise
    journal.remove()
    if report_failed(journal):
        return 2
    if outcome.wrong:
        print(f"parvis: {outcome.wrong}", file=sys.stderr)
        return 1
    if outcome.compared is None or options.fail_above is None:
        return 0
    return report_slower(outcome.compared, options.fail_above)


def say(text: str) -> None:
    """Print a line at once."""
    print(printable(text), flush=True)


def say_nothing(_: str) -> None:
    """Of ``--quiet``."""


def report_failed(journal: Journal) -> bool:
    """Print the error of each subject that failed while others went on; whether there is one."""
    for label, failure in journal.failed.items():
        fail(f"{label}: {str(failure) or type(failure).__name__}")
    return bool(journal.failed)


def save(options: BenchOptions, journal: Journal, error: BaseException) -> None:
    """Write and print what was measured before ``error`` ended the run, if anything was.

    A file of an earlier run stays as it is; the rows are then in a file beside it.
    """
    outcome = journal.outcome(why_ended(error))
    if not outcome.rows and not outcome.others:
        return
    paths: dict[str, Path | None] = {"json": options.json, "csv": options.csv, "html": options.html, "svg": options.svg}
    for name, file in paths.items():
        if file is not None and file != output.STANDARD_OUTPUT and file.exists():
            paths[name] = journal.place(file)
    try:
        output.write(outcome, quiet=options.quiet, **paths)
    except (OSError, OutputsError) as failed:
        fail(explain(failed) if isinstance(failed, OSError) else failed)
    if paths["json"] is not None and paths["json"] == options.json and options.json.exists():
        journal.remove()
    files = [str(file) for file in paths.values() if file is not None and file.exists()]
    where = f"; they are in {', '.join(files)}" if files else ""
    if len(journal.failed) > 1 or isinstance(error, (KeyboardInterrupt, SystemExit)):
        report_failed(journal)
    text = f"parvis: {len(outcome.rows)} rows were measured before the run ended{where}"
    print(printable(text), file=sys.stderr)


def why_ended(error: BaseException) -> str:
    """Why a run ended before its time, in a few words."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "the run was stopped"
    return f"the run failed: {error}" if str(error) else "the run failed"


def report_slower(comparison: compare.Comparison, limit: float) -> int:
    """Print the rows that are slower than ``limit`` to standard error; exit code 1 if there are any, or no pairs."""
    if not comparison.pairs:
        print("parvis: --fail-above: no row has its pair in the other file, so nothing was compared", file=sys.stderr)
        return 1
    withheld = compare.without_verdict(comparison)
    if withheld:
        print(f"parvis: --fail-above: {withheld}", file=sys.stderr)
    slower = compare.slower(comparison, limit)
    for row in slower:
        print(f"parvis: slower than --fail-above {limit:g}: {row}", file=sys.stderr)
    return 1 if slower else 0


@contextmanager
def progress_line(quiet: bool) -> Iterator[Progress]:
    """Print each step on stderr, in one line that is overwritten; silent with ``quiet`` or if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    width = 0

    def progress(text: str) -> None:
        nonlocal width
        sys.stderr.write(f"\r{text[:100].ljust(width)}")
        sys.stderr.flush()
        width = len(text[:100])

    try:
        yield progress
    finally:
        sys.stderr.write(f"\r{' ' * width}\r")


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis bench``; their names are the fields of ``BenchOptions``."""
    p = Parser(
        prog="parvis bench",
        description="Measure bundles: every phase of an image, throughput, latency under load, what passes between a "
        "command and its first image, or the paper's tables; against PyTorch, against n = 1 on the same engine, "
        "against an earlier run, and against what this device's memory and arithmetic allow. Subjects run in processes "
        "of their own and take turns; every row keeps its raw samples.",
        formatter_class=Help,
        epilog="suites:\n"
        "  phases   prefill, sequential, transition, group, decoder, copy, the whole image; loading; first preview "
        "(default)\n"
        "  batch    whole batches of 1, 2, 4, ... images until memory or the plateau\n"
        "  decoder  the image decoder alone\n"
        "  serve    requests that arrive at random, batched as they wait: latency against load\n"
        "  http     'parvis serve', asked by clients over HTTP: images a second, and latency against load\n"
        "  start    each time in a new process: Python, loading, self-test, first image, all of it; the second image\n"
        "  paper    the rows of the paper's Tables 2 and 3 and of its supplement, within --minutes\n"
        "  gpu      our kernels on this GPU: checks, the card's limits, the published sizes, within --minutes\n\n"
        "docs/benchmarks.md explains the numbers.",
    )
    p.add_argument(
        "bundles",
        type=path,
        nargs="*",
        metavar="BUNDLE",
        help="bundles to compare with each other; with --compare, one file of rows instead: nothing is measured then",
    )
    p.add_argument("--suite", choices=SUITES, default="phases", help="what to measure, see below (default: phases)")
    add_list(
        p,
        "--against",
        baselines,
        default=(),
        metavar="BASELINE",
        help="baselines in the same run: 'eager' (PyTorch with a static cache, the published way), "
        "'compiled' (the same by torch.compile), 'n1' (the same engine, one token a call; random weights), 'ort' "
        "(the same bundle on ONNX Runtime, on the CPU; the only one of --suite start, with n1 those of http)",
    )
    p.add_argument("--images", type=int, default=1, help="images in flight (default: 1)")
    p.add_argument("--unguided", action="store_true", help="one row per image instead of two")
    p.add_argument("--repetitions", type=int, default=5, help="counted ones, after one that is not (default: 5)")
    add_list(
        p,
        "--batches",
        counts,
        help="batch sizes of the batch and decoder suites: 1 2 4; largest of serve; numbers of clients of http "
        f"(default: {' '.join(map(str, CLIENTS))}); of the rows of gpu, and of the engines that --build-for builds for "
        "them (default of gpu: 1 8)",
    )
    p.add_argument(
        "--requests",
        type=int,
        help=f"of each load of the serve suite (default: {REQUESTS}) and of http ({REQUESTS_OVER_HTTP}; there of each "
        "repetition, and at least one a client)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        help="time for --suite paper and gpu, and for each load of serve and http (default: 10; gpu: 8)",
    )
    add_list(
        p,
        "--sizes",
        models,
        metavar="MODEL",
        help=f"models of --suite paper (default: {' '.join(SIZES)}) and gpu (default: all of it)",
    )
    p.add_argument("--no-eager", action="store_true", help="--suite paper and gpu without PyTorch's side")
    p.add_argument(
        "--engines",
        type=path,
        metavar="FOLDER",
        help="--suite gpu: engines that are built already, FOLDER/NAME/engines for the bundle of that name",
    )
    p.add_argument(
        "--build-for",
        metavar="TARGET",
        help="--suite gpu: measure nothing; build these engines into the folder of --engines, for a GPU that need "
        "not be here: SM90, SM80",
    )
    add_list(
        p,
        "--parts",
        parts,
        metavar="PART",
        help=f"--suite gpu: what to do, of {', '.join(PARTS)} (default: {' '.join(DEFAULT_PARTS)}); with "
        f"--build-for: whose engines are built, of {', '.join(BUILT_AHEAD)} (default: {BUILT_AHEAD[0]}); docs/gpu.md "
        "describes them",
    )
    p.add_argument(
        "--whole",
        action="store_true",
        help="phases and batch suites: make every call of PyTorch's images, however long; otherwise an image of more "
        "than 20 s is estimated from calls spread over it, and marked",
    )
    p.add_argument(
        "--json",
        type=path,
        metavar="FILE",
        help="JSON lines, a row each, which lie in FILE.part while they are measured; '-' is standard output, and no "
        "table then",
    )
    p.add_argument("--csv", type=path, metavar="FILE", help="the same rows for a spreadsheet")
    p.add_argument("--html", type=path, metavar="FILE", help="one page with plots, which needs no other file")
    p.add_argument(
        "--svg",
        type=path,
        metavar="FILE",
        help="--suite gpu: a figure of seconds per image, ours beside PyTorch and the bound, for light and dark pages",
    )
    p.add_argument(
        "--from",
        dest="from_files",
        type=path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="--suite gpu: measure nothing; make the page (and --svg) of the reports whose --json wrote these files, "
        "FILE.part too; needs no GPU. Of what several files hold the last measurement counts",
    )
    p.add_argument("--compare", type=path, metavar="OLD.jsonl", help="pair the rows with those of an earlier run")
    p.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="with --compare: exit code 1 where a row certainly got slower than this ratio",
    )
    p.add_argument(
        "--no-limits", action="store_true", help="do not measure this device's bandwidth and matrix peak: no bounds"
    )
    p.add_argument(
        "--device",
        default="auto",
        help="as in 'parvis generate': auto, cpu, cpu-ort, cuda, cuda:1, cuda-ort (default: auto)",
    )
    add_threads(p)
    add_arithmetic(p)
    p.add_argument(
        "--work",
        type=path,
        metavar="FOLDER",
        help="where bundles of random weights are written meanwhile (default: the system's)",
    )
    p.add_argument("--quiet", action="store_true", help="no progress, no table")
    return p


def baselines(text: str) -> tuple[str, ...]:
    """ "eager,n1" as a tuple. Raises ArgumentTypeError for a name that is no baseline."""
    return _chosen(text, BASELINES)


def models(text: str) -> tuple[str, ...]:
    """Models of the paper; "PAR-" may be left out. Raises ArgumentTypeError."""
    return _chosen(",".join(name if name.startswith("PAR-") else f"PAR-{name}" for name in text.split(",")), SIZES)


def parts(text: str) -> tuple[str, ...]:
    """Parts of a GPU's report, in their order. Raises ArgumentTypeError for a name that is no part."""
    chosen = _chosen(text, PARTS)
    return tuple(part for part in PARTS if part in chosen)


def _chosen(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"{wrong[0] if wrong else text!r}: expected one or more of {', '.join(known)}")
    return names


def counts(text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers, ascending. Raises ArgumentTypeError."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of images from 1 on: 1 2 4")
    return tuple(numbers)
