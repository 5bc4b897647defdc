"""Measuring: subjects in turns (A B A B), and their times as rows.

Subjects take turns because a shared machine changes by the minute: what disturbs one subject then disturbs the others
too, and the ratio of two medians stays true when both have moved. Every repetition is a whole batch, from labels to
pixels, and the times of its phases are parts of that same batch, so the phases of a subject add up to its image.

Letters: B images, N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

from par_runtime import __version__
from par_runtime.bench import machine
from par_runtime.bench.gpu import Gpu
from par_runtime.bench.machine import Machine, Watch
from par_runtime.bench.rows import INCOMPLETE, Row, few_repetitions, median, percent_in, quantile, spread
from par_runtime.bench.subjects.base import MODEL_PHASES, PHASES, OutOfTimeError, Sample, Subject, SubjectInfo
from par_runtime.cost.decoder import LEAST_OF_SUMS, LEAST_OF_WINOGRAD
from par_runtime.cost.work import Work, decoder_work, image_work, phase_work
from par_runtime.dtypes import BYTES
from par_runtime.tokenizer import CHUNK_PIXELS

#: A function that gets each step of the work as a line of text.
Progress = Callable[[str], None]
MakeSample = Callable[[Any], Sample]
#: Makes rows of a subject, its samples and the setting.
MakeRows = Callable[[Any, "Repetitions", "Setting"], list[Row]]
T = TypeVar("T")


def no_progress(_: str) -> None:
    """The :data:`Progress` of callers that report none."""


def no_work() -> None:
    """The ``between`` of a :class:`Setting` that has none."""


def keep_nothing(_: object, __: Callable[[], Sequence[Row]]) -> None:
    """The ``keep`` of a :class:`Setting` that has none."""


@dataclass(frozen=True)
class Setting:
    """What all rows of one measurement share.

    ``most_calls``: how many calls of an image a subject makes, by label; a subject without an entry makes all.
    ``between`` is called between two turns, when no subject works. ``keep`` takes, while rows are measured, a key and a
    function that makes the rows of what is measured so far (``journal.Journal``). ``failed``: subjects that failed
    while others could go on, by label, with the error. ``until``: no sample is begun, by ``time.monotonic``, that would
    end later if it took as long as the longest of its subject so far.
    """

    suite: str
    images: int = 1
    guided: bool = True
    repetitions: int = 5
    most_calls: Mapping[str, int] = field(default_factory=dict)
    gpu: Gpu | None = None
    between: Callable[[], None] = no_work
    keep: Callable[[object, Callable[[], Sequence[Row]]], None] = keep_nothing
    failed: dict[str, Exception] = field(default_factory=dict)
    until: float = math.inf


@dataclass
class Repetitions:
    """The samples of one subject, the flags of each, and those of the whole time in which they were made."""

    samples: list[Sample] = field(default_factory=list)
    flags: list[tuple[str, ...]] = field(default_factory=list)
    over_all: tuple[str, ...] = ()

    def summary(self, wanted: int) -> tuple[str, ...]:
        """Each kind of flag once, and "incomplete" where fewer samples than ``wanted`` were made.

        The system counts CPU time in steps of 10 ms, so what disturbs short repetitions shows only over all of them.
        """
        found = summarize(self.flags)
        if len(self.samples) < wanted:
            found = (f"{INCOMPLETE}: {len(self.samples)} of {wanted} repetitions were made before it ended", *found)
        kinds = {flag.split(":")[0] for flag in found}
        return (*found, *(flag for flag in self.over_all if flag.split(":")[0] not in kinds))


def measure(subjects: Sequence[Subject], setting: Setting, progress: Progress = no_progress) -> list[Row]:
    """Rows of every phase and of the whole batch of every subject, in the order of ``subjects``.

    Each subject makes one batch that is not counted, then all make ``repetitions`` in turns. A subject that fails is
    left out while another one works; raises what the last one's ``run`` raises.
    """
    for subject in subjects:
        progress(f"{subject.info.label}: warming up")
        attempt(subject, subjects, setting, partial(warm_up, subject, setting))
    return rows_in_turns(subjects, setting, progress)


def warm_up(subject: Subject, setting: Setting) -> None:
    """A batch that is not counted."""
    subject.run(setting.images, setting.guided, warm_up_calls(subject.info, setting))


def rows_in_turns(subjects: Sequence[Subject], setting: Setting, progress: Progress) -> list[Row]:
    """:func:`measure` without the batch that is not counted."""
    return take_turns(subjects, setting, partial(phase_rows, this_machine=machine.describe(setting.gpu)), progress)


def take_turns(
    subjects: Sequence[Any],
    setting: Setting,
    make_rows: MakeRows,
    progress: Progress = no_progress,
    make_sample: MakeSample | None = None,
    *,
    others: Sequence[Any] = (),
    what: str = "",
) -> list[Row]:
    """The rows of ``setting.repetitions`` samples of each subject that has not failed, in turns.

    ``make_rows`` makes the rows of a subject, of its samples and the setting. ``make_sample`` makes a sample (default:
    the subject's ``run``), which is ``what`` in words (default: the number of images). ``others``: subjects of which
    one may still work where all of these fail. Fewer samples are made where they would end after ``setting.until``.
    """
    measured = [Repetitions() for _ in subjects]
    whole = Watch(tuple(pid for subject in subjects for pid in process_ids(subject)), setting.gpu)
    key = object()

    def rows() -> list[Row]:
        over_all = whole.flags()
        both = [(s, replace(own, over_all=over_all)) for s, own in zip(subjects, measured, strict=True) if own.samples]
        return [row for subject, own in both for row in make_rows(subject, own, setting)]

    def sample_of(subject: Any) -> Sample:
        return subject.run(setting.images, setting.guided, setting.most_calls.get(subject.info.label))  # type: ignore

    def ended() -> list[Row]:
        made = rows()
        setting.keep(key, lambda: made)  # what comes later disturbs no row of these
        return made

    setting.keep(key, rows)
    longest = {subject.info.label: 0.0 for subject in subjects}
    for repetition in range(setting.repetitions):
        if repetition:
            setting.between()
        going = {label: seconds for label, seconds in longest.items() if label not in setting.failed}
        if time.monotonic() + sum(going.values()) > setting.until:
            break  # the turn of all, so that each has as many samples
        for subject, own in zip(subjects, measured, strict=True):
            label = subject.info.label
            began = time.monotonic()
            if label in setting.failed or began + longest[label] > setting.until:
                continue
            many = f"{setting.images} image{'s' if setting.images > 1 else ''}"
            progress(f"{label}: {what or many}, repetition {repetition + 1} of {setting.repetitions}")
            watch = Watch(process_ids(subject))  # what holds back a GPU is counted over all of it
            try:
                sample = attempt(subject, (*subjects, *others), setting, partial(make_sample or sample_of, subject))
            except OutOfTimeError:
                return ended()
            longest[label] = max(longest[label], time.monotonic() - began)
            if sample is not None:
                own.samples.append(sample)
                own.flags.append((*watch.flags(), *sample.flags))
        setting.keep(key, rows)
    return ended()


def attempt(subject: Subject, others: Sequence[Subject], setting: Setting, work: Callable[[], T]) -> T | None:
    """The result of ``work`` with ``subject``; None if it fails, or has failed before, and one of ``others`` has not.

    Raises what ``work`` raises where there is no other, and OutOfTimeError, which is no fault of the subject.
    """
    label = subject.info.label
    if label in setting.failed:
        return None
    try:
        return work()
    except OutOfTimeError:
        raise
    except Exception as error:
        setting.failed[label] = error
        if all(other.info.label in setting.failed for other in others):
            raise
        return None


def warm_up_calls(info: SubjectInfo, setting: Setting) -> int | None:
    """How many calls a warm-up makes: some of every phase, and all only of a short image."""
    chosen = setting.most_calls.get(info.label)
    return min(chosen or info.architecture.calls, max(24, info.architecture.calls // 8))


def process_ids(subject: Subject) -> tuple[int, ...]:
    """The process of a subject that has one of its own; else empty."""
    pid = getattr(subject, "pid", None)
    return () if pid is None else (pid,)


def phase_rows(subject: Subject, repetitions: Repetitions, setting: Setting, this_machine: Machine) -> list[Row]:
    """One row per phase that the subject has, and one of the whole batch."""
    info, samples = subject.info, repetitions.samples
    flags = repetitions.summary(setting.repetitions)
    if any(sample.chosen for sample in samples):
        made = model_calls(samples[0])
        flags = (f"estimated: {made} of {info.architecture.calls} calls were made, spread over the image", *flags)
    out = []
    for phase in PHASES:
        if phase not in samples[0].calls_ms:
            continue
        each = [sample.calls_ms[phase] for sample in samples]
        calls = phase_calls(info, phase, len(each[0]))
        totals = [sum(v) * (calls / len(v)) for v in each]
        times = [ms for v in each for ms in v]
        out.append(
            make_row(info, setting, this_machine, phase, totals, flags, samples, calls=calls, call_ms=median(times))
        )
    whole = [image_ms(sample, info) for sample in samples]
    calls = info.architecture.calls
    return [*out, make_row(info, setting, this_machine, "image", whole, flags, samples, calls=calls)]


def phase_calls(info: SubjectInfo, phase: str, made: int) -> int:
    """Calls of ``phase`` in one batch: by the architecture for the model's phases, else ``made``."""
    return next((p.repeat for p in info.architecture.phases if p.name == phase), made)


def model_calls(sample: Sample) -> int:
    """How many calls of the step network a sample made."""
    return sum(len(times) for name, times in sample.calls_ms.items() if name not in ("copy", "decoder"))


def image_ms(sample: Sample, info: SubjectInfo) -> float:
    """The time of the whole batch; if only some calls were made, each stands for an equal part of its phase."""
    if not sample.chosen:
        return sample.image_ms
    total = 0.0
    for phase, times in sample.calls_ms.items():
        if phase == "copy":  # there is one after each call
            total += sum(times) * info.architecture.calls / model_calls(sample)
        else:
            total += sum(times) * phase_calls(info, phase, len(times)) / len(times)
    return total


def summarize(flags: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Each kind of flag once: in how many repetitions it occurred, and its worst text.

    The worst text has the highest percentage; of equal ones, it is the longest.
    """
    worst: dict[str, str] = {}
    count = Counter(kind for each in flags for kind in {flag.split(":")[0] for flag in each})
    for flag in (flag for each in flags for flag in each):
        kind, _, text = flag.partition(": ")
        worst[kind] = max(worst.get(kind, ""), text, key=lambda t: (percent_in(t), len(t)))
    of = len(flags)
    return tuple(
        f"{kind}: {text}" if kind == "debug" else f"{kind}: in {count[kind]} of {of}, {text}"
        for kind, text in worst.items()
    )


def make_row(
    info: SubjectInfo,
    setting: Setting,
    this_machine: Machine,
    phase: str,
    samples_ms: Sequence[float],
    flags: Iterable[str] = (),
    samples: Sequence[Sample] = (),
    *,
    calls: int | None = None,
    call_ms: float | None = None,
    images_per_s: float | None = None,
    offered_per_s: float | None = None,
    clients: int | None = None,
) -> Row:
    """One row, without the bound that ``bounds.with_bounds`` adds."""
    work = least_work(info, setting.images, setting.guided, phase)
    middle = median(samples_ms)
    size, operations = (sum(c.bytes for c in work), sum(c.operations for c in work)) if work else (None, None)
    if phase == "image":
        images_per_s = 1e3 * setting.images / middle
    query = next((p.query for p in info.architecture.phases if p.name == phase), None)
    backend, version, computes = info.backend, info.version, info.computes
    if phase == "decoder" and info.decoder:
        backend, _, version = info.decoder.partition(" ")
        computes = info.decoder_computes
    return Row(
        suite=setting.suite,
        phase=phase,
        label=info.label,
        bundle=info.bundle,
        hash=info.hash,
        model=info.model,
        parameters=info.parameters,
        n=info.n,
        grid=info.grid,
        precision=info.precision,
        weights=info.weights,
        computes=computes,
        images=setting.images,
        guided=setting.guided,
        backend=backend,
        version=version,
        device=info.device,
        clock=info.clock,
        threads=info.threads,
        sampling=info.sampling,
        query=query,
        calls=calls,
        samples_ms=tuple(float(v) for v in samples_ms),
        median_ms=middle,
        spread_ms=spread(samples_ms),
        p95_ms=quantile(samples_ms, 0.95),
        call_ms=call_ms,
        images_per_s=images_per_s,
        offered_per_s=offered_per_s,
        peak_bytes=max((s.peak_bytes for s in samples if s.peak_bytes), default=None),
        bytes=None if size is None else int(size),
        operations=None if operations is None else int(operations),
        bound_ms=None,
        bound_by=None,
        gb_s=None if size is None else size / middle / 1e6,
        tflop_s=None if operations is None else operations / middle / 1e9,
        percent_of_bound=None,
        read_gb_s=None,
        matrix_tflop_s=None,
        limits_from="",
        excluded=info.excluded,
        flags=(*few_repetitions(samples_ms, phase, setting.suite), *flags),
        machine=this_machine,
        commit=machine.commit(),
        parvis=__version__,
        python=platform.python_version(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        pytorch=info.pytorch,
        decoder_computes=info.decoder_computes,
        decoder_bf16=info.decoder_bf16,
        clients=clients,
    )


def least_work(info: SubjectInfo, images: int, guided: bool, phase: str) -> list[Work]:
    """What each call of ``phase`` must read and calculate at least; empty for a phase that is not work on the model."""
    architecture, number_bytes = info.architecture, (info.weight_bytes, info.cache_bytes)
    decoder: list[Work] = []
    if info.image_size is not None:
        height, width = info.image_size
        chunks = -(-images // max(1, CHUNK_PIXELS // (height * width))) if info.device == "cpu" else 1
        if info.decoder.startswith("native-cpu"):
            images_least, clips_least = LEAST_OF_SUMS if "amx" in info.decoder else LEAST_OF_WINOGRAD
            least = clips_least if info.grid[0] > 1 else images_least
            operations = int(architecture.decoder_operations * least)
            architecture = replace(architecture, decoder_operations=operations)
        decoder = decoder_work(architecture, images, min(info.weight_bytes, BYTES[info.decoder_computes]), chunks)
    if phase == "decoder":
        return decoder
    if phase in ("image", "throughput"):
        return [*image_work(architecture, images, guided, *number_bytes), *decoder]
    return phase_work(architecture, phase, images, guided, *number_bytes) if phase in MODEL_PHASES else []
