"""The suite ``batch``: whole batches of growing size, until memory ends or a larger batch gives no more throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from par_runtime import system
from par_runtime.bench import machine
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Progress, Repetitions, Setting, image_ms, make_row, take_turns
from par_runtime.bench.rows import Row, median
from par_runtime.bench.subjects.base import Subject, SubjectInfo, TooManyImagesError
from par_runtime.cost.memory import cache_bytes
from par_runtime.errors import RequestError

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PLATEAU = 1.05  #: the suite ends at a batch whose throughput is less than this many times the best of smaller ones
#: The share of free memory that the caches of a batch may take; activations and the decoder need the other part.
MEMORY_SHARE = 0.7


def batch(
    subjects: Sequence[Subject], setting: Setting, progress: Progress, sizes: Sequence[int] | None = None
) -> list[Row]:
    """Whole batches of each size, all subjects in turns; a subject stops at its plateau, or where memory ends.

    If ``sizes`` are given, all of them are measured, whatever the plateau. Raises RequestError where no batch of any
    size could be made.
    """
    make_rows = partial(throughput_rows, this_machine=machine.describe(setting.gpu))
    rows: list[Row] = []
    going, best, why = list(subjects), dict[str, float](), ""
    for size in sizes or BATCHES:
        sized = replace(setting, images=size)
        able: list[Subject] = []
        for subject in going:
            try:
                check_caches(subject.info, sized)
                subject.run(size, setting.guided, 24)  # a short run, which makes the buffers of the new size
                able.append(subject)
            except MemoryError as error:
                why = f"{subject.info.label}: {size} images do not fit ({error})"
                progress(why)
            except TooManyImagesError as error:
                why = f"{subject.info.label}: {error}"
                progress(why)
        if not able:
            break
        measured = take_turns(able, sized, make_rows, progress)
        rows += measured
        going = []
        per_s = {row.label: row.images_per_s or 0.0 for row in measured}
        for subject in able:
            label = subject.info.label
            if label in setting.failed:
                continue
            if sizes is not None or per_s[label] > PLATEAU * best.get(label, 0.0):
                going.append(subject)
            else:
                progress(
                    f"{label}: {size} images give {per_s[label]:.3g} a second, as a smaller batch does; no larger one "
                    "is tried"
                )
            best[label] = max(best.get(label, 0.0), per_s[label])
    if not rows:
        raise RequestError(f"nothing was measured: {why}")
    return rows


def throughput_rows(subject: Subject, repetitions: Repetitions, setting: Setting, this_machine: Machine) -> list[Row]:
    """The row of the batches of one size."""
    info = subject.info
    whole = [image_ms(sample, info) for sample in repetitions.samples]
    row = make_row(
        info,
        setting,
        this_machine,
        "throughput",
        whole,
        repetitions.summary(setting.repetitions),
        repetitions.samples,
        calls=info.architecture.calls,
        images_per_s=1e3 * setting.images / median(whole),
    )
    return [row]


def check_caches(info: SubjectInfo, setting: Setting) -> None:
    """Raise MemoryError where the caches of a batch do not fit into free memory; one image is always tried."""
    if info.device == "cpu":
        free = system.available_bytes()
    else:
        free = None if setting.gpu is None else setting.gpu.memory_bytes
    needed = cache_bytes(info.architecture, setting.images, setting.guided, info.cache_bytes)
    if setting.images > 1 and free is not None and needed > MEMORY_SHARE * free:
        raise MemoryError(f"their caches take {needed / 1e9:.1f} GB of {free / 1e9:.1f} that are free")
