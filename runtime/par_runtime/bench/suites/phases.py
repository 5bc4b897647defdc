"""The suite ``phases``: every phase of a batch and the whole; loading; the time to a first preview."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from par_runtime.bench import machine
from par_runtime.bench.machine import Watch
from par_runtime.bench.measure import Progress, Setting, attempt, make_row, measure, process_ids, summarize
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Subject


def phases(subjects: Sequence[Subject], setting: Setting, progress: Progress) -> list[Row]:
    """Rows of every phase and of the image; of loading and of the first preview, for subjects that have these."""
    rows = measure(subjects, setting, progress)
    this_machine = machine.describe(setting.gpu)
    more: list[Row] = []
    setting.keep("load and preview", lambda: more)
    for subject in subjects:
        info = subject.info
        load_ms = getattr(subject, "load_ms", None)
        if load_ms is not None:
            more.append(make_row(info, setting, this_machine, "load", [load_ms]))
        preview = getattr(subject, "first_preview_ms", None)
        if preview is not None and not info.pytorch and info.image_size and info.label not in setting.failed:
            setting.between()
            progress(f"{info.label}: first preview")
            times, flags = [], []
            for _ in range(setting.repetitions):
                watch = Watch(process_ids(subject), setting.gpu)
                time = attempt(subject, subjects, setting, partial(preview, setting.images, setting.guided))
                if time is None:
                    break
                times.append(time)
                flags.append(watch.flags())
            if times:
                more.append(make_row(info, setting, this_machine, "first_preview", times, summarize(flags)))
    return rows + more
