"""The suites of ``parvis bench`` on given bundles: which settings are measured, and what rows that gives.

``phases``  a batch taken apart, loading, and the time to a first preview
``batch``   whole batches of growing size, until memory or the plateau
``decoder`` the image decoder alone, by batch size
``serve``   requests that arrive at random: ``serve.py``

The paper's tables are ``paper.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from par_runtime import system
from par_runtime.bench import machine
from par_runtime.bench.machine import Watch
from par_runtime.bench.measure import Say, Setting, image_ms, measure, pids, row, told, turns
from par_runtime.bench.rows import Row, median
from par_runtime.bench.subjects.base import Facts, Subject
from par_runtime.errors import RequestError

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PLATEAU = 1.05  #: a larger batch that gives less than so much more throughput ends the batch suite
#: Of free memory that the next batch may take by the caches' arithmetic; activations and the decoder come on top.
MEMORY_SHARE = 0.7


def phases(subjects: Sequence[Subject], setting: Setting, say: Say) -> list[Row]:
    """Every phase of a batch and the whole; loading; the first preview."""
    rows = measure(subjects, setting, say)
    where = machine.facts(setting.gpu)
    for subject in subjects:
        load_ms = getattr(subject, "load_ms", None)
        if load_ms is not None:
            rows.append(row(subject.facts, setting, where, "load", [load_ms]))
        preview = getattr(subject, "first_preview_ms", None)
        if preview is not None and "torch" not in subject.facts.backend and subject.facts.image_size:
            say(f"{subject.facts.label}: first preview")
            watch = Watch(pids(subject), setting.gpu)
            took = [preview(setting.images, setting.guided) for _ in range(3)]
            rows.append(row(subject.facts, setting, where, "first_preview", took, told([watch.flags()])))
    return rows


def batch(subjects: Sequence[Subject], setting: Setting, say: Say, sizes: Sequence[int] | None = None) -> list[Row]:
    """Whole batches of each size, all subjects in turns; a subject stops at its plateau, or where memory ends.

    ``sizes`` are measured all, whatever the plateau.
    """
    where = machine.facts(setting.gpu)
    rows: list[Row] = []
    going, best = list(subjects), dict[str, float]()
    for size in sizes or BATCHES:
        here = replace(setting, images=size)
        going = [subject for subject in going if fits(subject.facts, here, say)]
        measured: list[Subject] = []
        for subject in going:
            try:
                subject.run(size, setting.guided, 24)  # a short one: buffers of the new size are made here
                measured.append(subject)
            except MemoryError as error:
                say(f"{subject.facts.label}: {size} images do not fit ({error})")
        if not measured:
            break
        taken = turns(measured, here, say)
        going = []
        for subject, found in zip(measured, taken, strict=True):
            whole = [image_ms(sample, subject.facts) for sample in found.samples]
            per_s = 1e3 * size / median(whole)
            rows.append(
                row(
                    subject.facts,
                    here,
                    where,
                    "throughput",
                    whole,
                    told(found.flags),
                    found.samples,
                    calls=subject.facts.shape.calls,
                    images_per_s=per_s,
                )
            )
            label = subject.facts.label
            if sizes is not None or per_s > PLATEAU * best.get(label, 0.0):
                going.append(subject)
            else:
                say(
                    f"{label}: {size} images give {per_s:.3g} a second, as a smaller batch does; no larger one is tried"
                )
            best[label] = max(best.get(label, 0.0), per_s)
    return rows


def fits(facts: Facts, setting: Setting, say: Say) -> bool:
    """Whether the caches of a batch fit into free memory; one image is always tried."""
    if facts.device == "cpu":
        free = system.available_bytes()
    else:
        free = None if setting.gpu is None else setting.gpu.memory_bytes
    shape = facts.shape
    numbers = 2 * shape.n_layers * shape.n_heads * shape.head_dim * shape.n_tokens
    needed = setting.images * (2 if setting.guided else 1) * numbers * facts.cache_bytes
    if setting.images == 1 or free is None or needed <= MEMORY_SHARE * free:
        return True
    say(
        f"{facts.label}: the caches of {setting.images} images take {needed / 1e9:.1f} GB of {free / 1e9:.1f} that are free; ended"
    )
    return False


def decoder(subjects: Sequence[Subject], setting: Setting, say: Say, sizes: Sequence[int] | None = None) -> list[Row]:
    """The decoder alone. Raises RequestError where no subject has one."""
    able: list[Any] = [s for s in subjects if s.facts.image_size is not None and hasattr(s, "decode")]
    if not able:
        raise RequestError("--suite decoder: no bundle here has a decoder; export one with a tokenizer")
    where = machine.facts(setting.gpu)
    rows = []
    for size in sizes or (1, 2, 4, 8):
        here = replace(setting, images=size)
        for subject in able:
            subject.decode(size)
        taken = turns(able, here, say, lambda subject: subject.decode(size))  # noqa: B023, used before the next size
        for subject, found in zip(able, taken, strict=True):
            took = [sum(sample.calls_ms["decoder"]) for sample in found.samples]
            calls = len(found.samples[0].calls_ms["decoder"])
            per_s = 1e3 * size / median(took)
            made = (told(found.flags), found.samples)
            rows.append(row(subject.facts, here, where, "decoder", took, *made, calls=calls, images_per_s=per_s))
    return rows
