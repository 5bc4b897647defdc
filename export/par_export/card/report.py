"""The report of a GPU: everything that is to be known of our kernels on a card, in a given time.

First whether they compute what they should, while engines are built and PyTorch's twins are compiled; then what the
card allows; then rows, model by model, the most valuable first. Whatever fails or does not fit into the time is said,
and nothing that was measured is lost.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from par_export.card.limits import COPY, MATRICES
from par_export.card.lines import check, words
from par_export.card.plan import BATCHES, CODES, CODES_N, MODELS, Block, Model, blocks, label_of
from par_export.card.prepare import QUANTISED, Builder, MakeEngine, Preparation, Twin, copies, copy_engines
from par_export.card.processes import Ended, Line, run_stage
from par_export.card.samples import SAMPLES, Sample
from par_export.card.table import Findings, markdown
from par_export.quantised import Codes
from par_runtime.bench import machine
from par_runtime.bench.bounds import GPU, with_bounds
from par_runtime.bench.gpu import Gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.limits import Limits
from par_runtime.bench.measure import Progress, Setting, make_row, rows_in_turns, warm_up
from par_runtime.bench.report.output import Outcome
from par_runtime.bench.rows import Row
from par_runtime.bench.run import GPU_MINUTES
from par_runtime.bench.subjects.base import SubjectInfo
from par_runtime.bench.subjects.process import SubjectProcess, open_random

#: Parts of the time: after the first, checks are ended; after the second, nothing is waited for any more.
CHECKS_END, WAIT_END = 0.4, 0.45
CHECKS_AT_ONCE = 8
GRACE_S = 10.0  #: after the end of the report a subject that is still at work is killed
LEAST_S = 12.0  #: a block that has less time is left out
STRESS_IMAGES = 200
REPETITIONS = 5
SANITIZER = "compute-sanitizer"
TOOLKIT = "/usr/local/cuda/bin"  #: where it is, if not on the path
SANITIZER_OPTIONS = ("--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all")
SANITIZER_S = 90.0


@dataclass(frozen=True)
class CardOptions:
    """What to report. ``checked``: bundles whose whole images are checked; ``samples``: those whose kernels are;
    ``engines``: a folder of ready engines.

    Of the largest bundle of ``checked`` whole images are checked with quantised weights too, in each form of ``codes``.
    ``engines`` holds a folder for each bundle, by its name, with the engines of it in ``engines/``. ``torch``:
    PyTorch's device; ``groups``: how many calls of the last phase ``verify`` compares; ``limits``: other sizes for
    :func:`par_export.card.stages.limits_stage`.
    """

    device: int = 0
    minutes: float = GPU_MINUTES
    checked: Sequence[Path] = ()
    samples: Sequence[Sample] = SAMPLES
    codes: Sequence[Codes] = CODES
    models: Sequence[Model] = MODELS
    engines: Path | None = None
    repetitions: int = REPETITIONS
    images: Sequence[int] = BATCHES
    twins: bool = True
    work: Path | None = None
    torch: str = "cuda:0"
    groups: int | None = 8
    stress: int = STRESS_IMAGES
    limits: Mapping[str, int] = field(default_factory=dict)
    build: MakeEngine | None = None


def bundles_to_check() -> list[Path]:
    """The bundles of the checkout that this package runs in: the demo and the tiny one; none where it is installed."""
    root = Path(__file__).resolve().parents[3]
    return [path for path in (root / "tests" / "data" / "tiny", root / "models" / "demo") if path.is_dir()]


def report(options: CardOptions, gpu: Gpu, progress: Progress, journal: Journal) -> list[Row]:
    """Measure; returns the rows. ``journal.finish`` makes of them the outcome, with the page as text.

    Raises OSError.
    """
    return _Report(options, gpu, progress, journal).run()


@dataclass
class _State:
    """What was found so far."""

    lines: list[Line] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    infos: dict[str, SubjectInfo] = field(default_factory=dict)


class _Report:
    def __init__(self, options: CardOptions, gpu: Gpu, progress: Progress, journal: Journal) -> None:
        self._options, self._gpu, self._progress, self._journal = options, gpu, progress, journal
        self._began = time.monotonic()
        self._seconds = 60 * options.minutes
        self._end = self._began + self._seconds
        self._machine = machine.describe(gpu)
        self._date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self._state = _State()
        self._device = f"cuda:{options.device}"
        self._builder = Builder(options.device, self._end)
        journal.finish = self.finish

    # -- the result ---------------------------------------------------------------------------------------------------

    def finish(self, rows: Sequence[Row]) -> Outcome:
        """The outcome of ``rows`` and of all that was found beside them."""
        limits = self._limits()
        bounded = with_bounds(rows, self._state.infos, {} if limits is None else {GPU: limits})
        found = Findings(
            self._machine,
            machine.commit(),
            self._date,
            (time.monotonic() - self._began) / 60,
            bounded,
            self._state.lines,
            self._state.left_out,
        )
        where = {"gpu": self._machine.gpu, "driver": self._machine.gpu_driver, "commit": machine.commit()}
        others: list[Line] = [line | where for line in self._state.lines]
        others += [{"kind": "left_out", "text": text} | where for text in self._state.left_out]
        wrong = f"{len(found.wrong)} of {len(found.of('check'))} checks failed" if found.wrong else ""
        if not found.of("check"):
            wrong = "nothing was checked"
        return Outcome(bounded, [], [], others=others, page=markdown(found), wrong=wrong)

    def _limits(self) -> Limits | None:
        values = {line["name"]: line["value"] for line in self._state.lines if line["kind"] == "limit"}
        if COPY not in values:
            return None
        how = "measured in the same run: copies of random bytes on the device, both ways counted; torch.matmul in fp16"
        return Limits(((2**40, values[COPY]),), values.get(MATRICES), how)

    # -- the parts ----------------------------------------------------------------------------------------------------

    def run(self) -> list[Row]:
        """Everything."""
        options = self._options
        with ExitStack() as held:
            held.enter_context(self._builder)
            work = Path(held.enter_context(tempfile.TemporaryDirectory(dir=options.work, prefix="parvis-gpu-")))
            models = [model if options.twins else replace(model, twins=()) for model in options.models]
            prepared = Preparation(models, work, self._build, options.images, options.torch, self._end + GRACE_S)
            held.callback(prepared.close)
            self._checks(work)
            self._wait_for_twins(prepared)
            self._measure_limits()
            rows: list[Row] = []
            waiting = blocks(models, options.images)
            while waiting:
                block = waiting.pop(0)
                left = self._end - time.monotonic()
                if left < LEAST_S:
                    self._leave_out(block.name, "time")
                    continue
                share = block.weight / (block.weight + sum(other.weight for other in waiting))
                try:
                    rows += self._block(block, prepared, time.monotonic() + share * left)
                except Exception as error:
                    self._leave_out(block.name, error)
            self._progress("")
        return rows

    def _leave_out(self, what: str, why: object) -> None:
        self._state.left_out.append(f"{what}: {words(why)}")

    def _build(self, path: Path, images: Sequence[int]) -> None:
        """The engine of a bundle: a ready one, else a new one."""
        if self._options.engines is not None and copy_engines(self._options.engines, path):
            return
        (self._options.build or self._builder)(path, images)

    # -- right? -------------------------------------------------------------------------------------------------------

    def _checks(self, work: Path) -> None:
        """Every check, several at once: none of them is timed."""
        until = self._began + CHECKS_END * self._seconds
        started: list[tuple[str, Future[Ended]]] = []
        samples = self._options.samples
        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:

            def start(name: str, run: Callable[[], Ended]) -> None:
                started.append((name, pool.submit(run)))

            def start_sample(sample: Sample) -> None:
                start(f"{sample.name}: kernels", partial(self._of_sample, sample, work / "samples", until))

            for sample in samples:
                if sample.codes is None:
                    start_sample(sample)
            bundles: dict[str, Path] = {}
            for name, path in self._checked_bundles(work):
                bundles[name] = path
                spec = {"path": str(path), "name": name, "device": self._device, "reference": "cpu", "seed": 7}
                spec |= {"groups": self._options.groups, "images": self._options.stress}
                start(f"{name}: images", partial(run_stage, "images", spec, until))
                if path.parent.name != QUANTISED:  # codes change nothing about memory
                    start(f"{name}: memory", partial(run_stage, "memory", spec, until))
            for name, run in self._sanitized(bundles, until):
                start(name, run)
            for sample in samples:
                if sample.codes is not None:  # after whole images: where there is no time for all, these matter less
                    start_sample(sample)
            for name, future in started:
                self._progress(f"checking: {name}")
                try:
                    self._take(name, future.result())
                except Exception as error:
                    self._wrong(name, error)
                self._keep()

    def _of_sample(self, sample: Sample, work: Path, until: float) -> Ended:
        """Every kernel of a sample's engine, which is built for it. Raises what the build raises."""
        if time.monotonic() > until:
            return Ended(why="there was no time for it")
        path = sample.write(work / sample.name)
        self._build(path, sample.images)
        spec = {"path": str(path), "name": sample.name, "device": self._device, "torch": self._options.torch}
        return run_stage("kernels", spec, until)

    def _checked_bundles(self, work: Path) -> Iterator[tuple[str, Path]]:
        """Copies of the bundles to check, and quantised ones, each as soon as it has an engine: its name and path."""
        for path, make in copies(self._options.checked, self._options.codes, work).items():
            name = path.name
            try:
                make()
                self._progress(f"building an engine of {name}")
                self._build(path, (1, 2, 4))
            except Exception as error:
                self._wrong(f"{name}: an engine is built", error)
                continue
            yield name, path

    def _sanitized(self, bundles: Mapping[str, Path], until: float) -> list[tuple[str, Callable[[], Ended]]]:
        """One image of the smallest bundle under NVIDIA's checker of memory accesses, where there is one."""
        program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=TOOLKIT)
        if program is None:
            self._leave_out(SANITIZER, f"neither on this machine's path nor in {TOOLKIT}")
            return []
        if not bundles:
            return []
        name, path = min(bundles.items(), key=lambda item: (item[1] / "weights.data").stat().st_size)
        spec = {"path": str(path), "name": name, "device": self._device}
        until = min(until, time.monotonic() + SANITIZER_S)
        return [(SANITIZER, partial(run_stage, "one_image", spec, until, (program, *SANITIZER_OPTIONS)))]

    def _take(self, name: str, ended: Ended) -> None:
        """Keep the lines of a stage; one that ended before its time is a check that failed."""
        self._state.lines += ended.lines
        if name == SANITIZER:
            said = [line.strip("= ") for line in ended.said if "=====" in line]
            if not any("ERROR SUMMARY" in line for line in said):  # it cannot watch here, which says nothing of us
                self._leave_out(SANITIZER, " ".join([ended.why, *said])[:300])
                return
            errors = [line for line in said if "COMPUTE-SANITIZER" not in line]
            self._state.lines.append(check(f"{SANITIZER}: one image", not ended.why, "; ".join(errors[:4])))
        elif ended.why:
            self._wrong(ended.during or name, ended.why)

    def _wrong(self, name: str, why: object) -> None:
        self._state.lines.append(check(name, False, words(why)))

    # -- how fast? ----------------------------------------------------------------------------------------------------

    def _wait_for_twins(self, prepared: Preparation) -> None:
        """Wait until nothing is compiled any more, which takes the processors that launching needs."""
        until = self._began + WAIT_END * self._seconds
        for (model, n, twin), future in prepared.twins.items():
            self._progress(f"waiting for {label_of(model, n, twin)}")
            _ended(future, until)
        for engine in prepared.engines.values():
            _ended(engine, until)

    def _measure_limits(self) -> None:
        self._progress("the card's limits")
        spec = {"index": self._options.device, "torch": self._options.torch, **self._options.limits}
        ended = run_stage("limits", spec, min(self._end, time.monotonic() + 60))
        self._state.lines += ended.lines
        if ended.why:
            self._leave_out("limits", ended.why)

    def _block(self, block: Block, prepared: Preparation, until: float) -> list[Row]:
        """The rows of a block. What cannot be loaded is left out, with the reason."""
        with ExitStack() as held:
            ours = self._open(block, prepared, held, until)
            subjects, most_calls = list(ours.values()), {}
            if block.images == 1:
                for twin in self._twins(block.model, prepared):
                    subjects.append(twin.process)
                    held.callback(twin.process.close)
                    if twin.most_calls is not None:
                        most_calls[twin.process.info.label] = twin.most_calls
            setting = Setting(
                "gpu",
                block.images,
                repetitions=self._options.repetitions,
                gpu=self._gpu,
                most_calls=most_calls,
                keep=self._journal.keep,
                until=until,
            )
            ready = [subject for subject in subjects if self._ready(subject, setting)]
            self._state.infos |= {subject.info.label: subject.info for subject in ready}
            if not ready:
                return []
            try:
                rows = rows_in_turns(ready, setting, self._progress)
            except Exception as error:  # of the last subject
                self._leave_out(block.name, error)
                return []
            for label, why in setting.failed.items():
                self._leave_out(f"{label}, batch {block.images}", why)
            rows += self._more(block, ours, setting)
            return rows

    def _open(self, block: Block, prepared: Preparation, held: ExitStack, until: float) -> dict[str, SubjectProcess]:
        """Our subjects of a block by label, loaded at the same time."""
        model, opened = block.model, {}
        quantised = {label_of(model.name, CODES_N, str(codes)) for codes in model.codes}

        def load(label: str) -> SubjectProcess:
            # What is built last is not waited for: that is the time of the others.
            wait = 1.0 if label in quantised else max(1.0, until - time.monotonic())
            path = prepared.engines[label].result(wait)
            return open_random(path, label, device=self._device, end=self._end + GRACE_S)

        self._progress(f"{block.name}: loading")
        with ThreadPoolExecutor(1 if block.loads else len(model.labels)) as pool:
            # n = 4 after the others: then the file is in memory, which all n of a model share. Quantised weights last:
            # where memory is short, they are what is left out.
            order = sorted(model.labels, key=lambda label: (label in quantised, label == label_of(model.name, 4)))
            futures = {label: pool.submit(load, label) for label in order}
            for label, future in futures.items():
                try:
                    opened[label] = future.result()
                except FutureTimeoutError:
                    self._leave_out(label, "its engine was not built in time")
                except Exception as error:
                    self._leave_out(f"{label}, batch {block.images}", error)
        for subject in opened.values():
            held.callback(subject.close)
        return {label: opened[label] for label in model.labels if label in opened}

    def _twins(self, model: Model, prepared: Preparation) -> list[Twin]:
        """The twins of a model that are ready by now."""
        out = []
        for (name, n, twin), future in prepared.twins.items():
            if name != model.name:
                continue
            label = label_of(name, n, twin)
            if not future.done():
                self._leave_out(label, "it was not compiled in time")
                continue
            try:
                out.append(future.result())
            except Exception as error:
                self._leave_out(label, error)
        return out

    def _ready(self, subject: SubjectProcess, setting: Setting) -> bool:
        """Whether a batch that is not counted succeeds."""
        self._progress(f"{subject.info.label}: warming up")
        try:
            warm_up(subject, setting)
        except Exception as error:
            self._leave_out(f"{subject.info.label}, batch {setting.images}", error)
            return False
        return True

    def _more(self, block: Block, ours: Mapping[str, SubjectProcess], setting: Setting) -> list[Row]:
        """Beside the rows in turns: loading, the decoder alone, and what each kernel takes."""
        able = {label: ours[label] for label in block.model.labels if label in ours and label in self._state.infos}
        loaded = able.values() if block.loads else ()
        rows = [make_row(s.info, setting, self._machine, "load", [s.load_ms]) for s in loaded]
        for label, subject in able.items():
            if time.monotonic() > self._end:
                self._leave_out(f"kernels of {label}, batch {block.images}", "time")
                continue
            self._progress(f"{label}: each kernel")
            try:
                timed = subject.kernels(block.images, True)
            except Exception as error:
                self._leave_out(f"kernels of {label}, batch {block.images}", error)
                continue
            about = {"kind": "kernel", "label": label, "images": block.images}
            self._state.lines += [about | one for one in timed]
        self._keep()
        return rows

    def _keep(self) -> None:
        """Have what was found so far written beside the rows."""
        self._journal.keep("lines", lambda: [])


def _ended(future: Future[Any], until: float) -> None:
    """Wait for the end of ``future``, whatever it is, or for ``until``."""
    try:
        future.exception(max(0.0, until - time.monotonic()))
    except FutureTimeoutError:
        return
