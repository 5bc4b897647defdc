"""The subjects of a run on given bundles: these, then their baselines, each with a name and a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from par_runtime.backends.choose import CPUS
from par_runtime.backends.engines import has_engines
from par_runtime.bench.measure import Progress
from par_runtime.bench.subjects.baselines import write_n1_bundle
from par_runtime.bench.subjects.process import SubjectProcess, open_bundle, open_eager
from par_runtime.bench.subjects.served import ServedSubject, check_servable
from par_runtime.bench.subjects.starts import Start, StartSubject
from par_runtime.bundle import Bundle

if TYPE_CHECKING:
    from par_runtime.bench.run import BenchOptions

#: A process that makes batches until the run ends; or one after the other, each of which is measured from its start; or
#: a server, which is started when its turn comes.
Opened = SubjectProcess | StartSubject | ServedSubject


def open_subjects(
    options: BenchOptions, opened: ExitStack, progress: Progress, warn: Callable[[str], None]
) -> Iterator[Opened]:
    """The bundles, then their baselines, each in a process that ``opened`` ends."""
    bundles = [Bundle.open(path) for path in options.bundles]
    if options.suite == "http":
        check_servable(bundles)
    labels = short_names(options.bundles, bundles)
    for path, label, bundle in zip(options.bundles, labels, bundles, strict=True):
        progress(f"{label}: loading")
        start = partial(
            _opens(options),
            path,
            label,
            device=options.device,
            threads=options.threads,
            selftest=has_selftest(bundle),
            rounding=options.rounding,
        )
        subject = _open(options, start, opened)
        if subject.note and has_engines(bundle):
            warn(subject.note)
        yield subject
    for baseline in options.against:
        for path, label in zip(options.bundles, labels, strict=True):
            name = baseline if len(labels) == 1 else f"{label} {baseline}"
            progress(f"{name}: loading")
            yield _open(options, _baseline(options, path, baseline, name, opened), opened)


def _opens(options: BenchOptions) -> Callable[..., Opened]:
    """What opens a bundle in the form that the suite measures."""
    return ServedSubject if options.suite == "http" else open_bundle


def _open(options: BenchOptions, start: Callable[[], Opened], opened: ExitStack) -> Opened:
    """What ``start`` starts, or what starts it for each sample; ``opened`` ends it."""
    subject = StartSubject(cast(Start, start)) if options.suite == "start" else start()
    opened.callback(subject.close)
    return subject


def _baseline(options: BenchOptions, path: Path, baseline: str, label: str, opened: ExitStack) -> Callable[[], Opened]:
    """What starts one of ``run.BASELINES`` of the bundle at ``path``."""
    threads = options.threads
    rounding = options.rounding
    if baseline == "n1":
        # It has no proof that rounding does no harm; it rounds as the bundle does, so that n alone differs.
        rounding = Bundle.open(path, "none").rounding(rounding)
        folder = tempfile.TemporaryDirectory(dir=options.work, prefix="parvis-bench-")
        n1 = write_n1_bundle(path, Path(opened.enter_context(folder)))
        device = options.device if options.device in CPUS else "cpu"
        return partial(_opens(options), n1, label, device=device, threads=threads, selftest=False, rounding=rounding)
    if baseline == "ort":
        selftest = has_selftest(Bundle.open(path, "none"))
        on_ort = partial(_opens(options), device="cpu-ort")
        return partial(on_ort, path, label, threads=threads, selftest=selftest, rounding=rounding)
    device = "cpu" if options.device in ("auto", *CPUS) else "cuda"
    return partial(open_eager, path, label, threads=threads, compiled=baseline == "compiled", device=device)


def has_selftest(bundle: Bundle) -> bool:
    """Whether the bundle has a self-test to pass; one of random weights has none."""
    return bool(bundle.selftest["labels"])


def short_names(paths: Sequence[Path], bundles: Sequence[Bundle]) -> list[str]:
    """A short name for each of ``bundles`` at ``paths``: "parvis" for the only one, else its folder's name.

    Equal names are told apart by what differs: what matrices are stored in, n, else the first digits of the hash. A
    bundle that is given twice gets a number each time.
    """
    if len(paths) == 1:
        return ["parvis"]
    # The name of a folder need not be text; no row with half a character in it could be read again.
    names = [os.fsencode(Path(os.path.abspath(path)).name).decode("utf-8", "backslashreplace") for path in paths]
    for more in ([b.stored for b in bundles], [f"n={b.group_size}" for b in bundles], [b.hash[:8] for b in bundles]):
        of_name = {name: {m for n, m in zip(names, more, strict=True) if n == name} for name in names}
        names = [f"{name} {m}" if len(of_name[name]) > 1 else name for name, m in zip(names, more, strict=True)]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]
