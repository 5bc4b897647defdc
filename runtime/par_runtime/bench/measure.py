"""Measuring: subjects in turns (A B A B), and what they took as rows.

Turns, because a shared machine changes by the minute: what disturbs one subject then disturbs its neighbour too, and the
ratio of two medians stays true when both have moved. Every repetition is a whole batch, from labels to pixels, and the
times of its phases are parts of that same batch, so the phases of a subject add up to its image.

Letters: B images, N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from par_runtime import __version__
from par_runtime.bench import machine
from par_runtime.bench.gpu import Gpu
from par_runtime.bench.limits import Limits
from par_runtime.bench.machine import Machine, Watch
from par_runtime.bench.rows import Row, few, median, quantile, spread
from par_runtime.bench.subjects.base import PHASES, Facts, Sample, Subject
from par_runtime.cost import bound
from par_runtime.tokenizer import CHUNK_PIXELS

Say = Callable[[str], None]
Make = Callable[[Any], Sample]


@dataclass(frozen=True)
class Setting:
    """What all rows of one measurement share.

    ``most_calls``: of an image, by subject's label; a label that is not there makes all.
    """

    suite: str
    images: int = 1
    guided: bool = True
    repetitions: int = 5
    most_calls: Mapping[str, int] = field(default_factory=dict)
    gpu: Gpu | None = None


@dataclass
class Taken:
    """The samples of one subject, and what disturbed each of them."""

    samples: list[Sample] = field(default_factory=list)
    flags: list[tuple[str, ...]] = field(default_factory=list)


def measure(subjects: Sequence[Subject], setting: Setting, say: Say = lambda _: None) -> list[Row]:
    """Rows of every phase and of the whole batch of every subject, in the order of ``subjects``.

    Each subject makes one batch that is not counted, then all make ``repetitions`` in turns. Raises what a subject's
    ``run`` raises.
    """
    for subject in subjects:
        say(f"{subject.facts.label}: warming up")
        subject.run(setting.images, setting.guided, warm_calls(subject.facts, setting))
    taken = turns(subjects, setting, say)
    where = machine.facts(setting.gpu)
    return [
        row for subject, found in zip(subjects, taken, strict=True) for row in rows_of(subject, found, setting, where)
    ]


def turns(
    subjects: Sequence[Subject], setting: Setting, say: Say = lambda _: None, make: Make | None = None
) -> list[Taken]:
    """``setting.repetitions`` samples of each subject, in turns; ``make`` makes one (default: its ``run``)."""
    taken = [Taken() for _ in subjects]
    for repetition in range(setting.repetitions):
        for subject, found in zip(subjects, taken, strict=True):
            label = subject.facts.label
            many = f"{setting.images} image{'s' if setting.images > 1 else ''}"
            say(f"{label}: {many}, repetition {repetition + 1} of {setting.repetitions}")
            watch = Watch(pids(subject), setting.gpu)
            if make is None:
                sample = subject.run(setting.images, setting.guided, setting.most_calls.get(label))
            else:
                sample = make(subject)
            found.samples.append(sample)
            found.flags.append(watch.flags())
    return taken


def warm_calls(facts: Facts, setting: Setting) -> int | None:
    """A warm-up touches every phase and window; only a short image is made whole for it."""
    chosen = setting.most_calls.get(facts.label)
    return min(chosen or facts.shape.calls, max(24, facts.shape.calls // 8))


def pids(subject: Subject) -> tuple[int, ...]:
    """The process that a subject lives in, if it is not this one."""
    pid = getattr(subject, "pid", None)
    return () if pid is None else (pid,)


def rows_of(subject: Subject, taken: Taken, setting: Setting, where: Machine) -> list[Row]:
    """One row per phase that the subject has, and one of the whole batch."""
    facts, samples = subject.facts, taken.samples
    flags = told(taken.flags)
    if any(sample.chosen for sample in samples):
        made = sum(len(v) for name, v in samples[0].calls_ms.items() if name not in ("decoder", "copy"))
        flags = (f"estimated: {made} of {facts.shape.calls} calls were made, spread over the image", *flags)
    out = []
    for phase in PHASES:
        if phase not in samples[0].calls_ms:
            continue
        each = [sample.calls_ms[phase] for sample in samples]
        calls = calls_of(facts, phase, len(each[0]))
        totals = [sum(v) * (calls / len(v)) for v in each]
        times = [ms for v in each for ms in v]
        out.append(row(facts, setting, where, phase, totals, flags, samples, calls=calls, call_ms=median(times)))
    whole = [image_ms(sample, facts) for sample in samples]
    return [*out, row(facts, setting, where, "image", whole, flags, samples, calls=facts.shape.calls)]


def calls_of(facts: Facts, phase: str, made: int) -> int:
    """Calls of ``phase`` in one batch; the model's are known, ``made`` of the others were."""
    return next((p.repeat for p in facts.shape.phases if p.name == phase), made)


def image_ms(sample: Sample, facts: Facts) -> float:
    """The whole batch; where only some calls were made, each of them stands for its part of the phase."""
    if not sample.chosen:
        return sample.image_ms
    total = 0.0
    for phase, took in sample.calls_ms.items():
        if phase == "copy":  # between two calls each
            made = sum(len(v) for name, v in sample.calls_ms.items() if name not in ("copy", "decoder"))
            total += sum(took) * facts.shape.calls / made
        else:
            total += sum(took) * calls_of(facts, phase, len(took)) / len(took)
    return total


def told(flags: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Each kind of flag once: in how many repetitions, and how it was at its longest."""
    worst: dict[str, str] = {}
    count = Counter(kind for each in flags for kind in {flag.split(":")[0] for flag in each})
    for flag in (flag for each in flags for flag in each):
        kind, _, text = flag.partition(": ")
        worst[kind] = max(worst.get(kind, ""), text, key=lambda t: (_percent(t), len(t)))
    of = len(flags)
    return tuple(
        f"{kind}: {text}" if kind == "debug" else f"{kind}: in {count[kind]} of {of}, {text}"
        for kind, text in worst.items()
    )


def _percent(text: str) -> float:
    before = text.partition(" %")[0].split()
    try:
        return float(before[-1])
    except (IndexError, ValueError):
        return 0.0


def row(
    facts: Facts,
    setting: Setting,
    where: Machine,
    phase: str,
    samples_ms: Sequence[float],
    flags: Iterable[str] = (),
    samples: Sequence[Sample] = (),
    *,
    calls: int | None = None,
    call_ms: float | None = None,
    images_per_s: float | None = None,
    offered_per_s: float | None = None,
) -> Row:
    """One row; :func:`bounded` puts the device's limits beside it."""
    least = least_of(facts, setting.images, setting.guided, phase)
    middle = median(samples_ms)
    size, operations = (sum(c.bytes for c in least), sum(c.operations for c in least)) if least else (None, None)
    if phase == "image":
        images_per_s = 1e3 * setting.images / middle
    query = next((p.query for p in facts.shape.phases if p.name == phase), None)
    return Row(
        suite=setting.suite,
        phase=phase,
        label=facts.label,
        bundle=facts.bundle,
        hash=facts.hash,
        model=facts.model,
        parameters=facts.parameters,
        n=facts.n,
        grid=facts.grid,
        precision=facts.precision,
        computes=facts.computes,
        images=setting.images,
        guided=setting.guided,
        backend=facts.backend,
        version=facts.version,
        device=facts.device,
        clock=facts.clock,
        threads=facts.threads,
        sampling=facts.sampling,
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
        excluded=facts.excluded,
        flags=(*few(samples_ms), *flags),
        machine=where,
        commit=machine.commit(),
        parvis=__version__,
        python=platform.python_version(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def bounded(rows: Iterable[Row], facts: Mapping[str, Facts], limits: Mapping[int, Limits]) -> list[Row]:
    """Rows with the least time that the device's ``limits`` allow them; ``facts`` by label.

    ``limits`` by number of threads, 0 for the GPU; a row whose are not there stays as it is. They are measured before and
    after the rows, and the better of both counts, which is why rows are made without.
    """
    out = []
    for each in rows:
        found = limits.get(0 if each.threads is None else each.threads)
        least = least_of(facts[each.label], each.images, each.guided, each.phase)
        if found is None or not least:
            out.append(each)
            continue
        read = found.read_gb_s(max(call.bytes for call in least))
        fastest = bound.bound(least, read, found.matrix_tflop_s)
        out.append(
            replace(
                each,
                bound_ms=fastest.ms,
                bound_by=fastest.by,
                percent_of_bound=100 * fastest.ms / each.median_ms,
                read_gb_s=read,
                matrix_tflop_s=found.matrix_tflop_s,
                limits_from=found.how,
            )
        )
    return out


def least_of(facts: Facts, images: int, guided: bool, phase: str) -> list[bound.Call]:
    """What the calls of ``phase`` must read and calculate at least; nothing for what is not work on the model."""
    shape, bytes_ = facts.shape, (facts.weight_bytes, facts.cache_bytes)
    decoder: list[bound.Call] = []
    if facts.image_size is not None:
        height, width = facts.image_size
        chunks = -(-images // max(1, CHUNK_PIXELS // (height * width))) if facts.device == "cpu" else 1
        decoder = bound.decoder_calls(shape, images, facts.weight_bytes, chunks)
    if phase == "decoder":
        return decoder
    if phase in ("image", "throughput"):
        return [*bound.all_calls(shape, images, guided, *bytes_), *decoder]
    if phase in PHASES and phase != "copy":
        return bound.phase_calls(shape, phase, images, guided, *bytes_)
    return []
