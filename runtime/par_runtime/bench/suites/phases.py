"""The suite ``phases``: every phase of a batch and the whole; loading; the time to a first preview."""

from __future__ import annotations

from collections.abc import Sequence

from par_runtime.bench import machine
from par_runtime.bench.machine import Watch
from par_runtime.bench.measure import Progress, Setting, make_row, measure, process_ids, summarize
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Subject


def phases(subjects: Sequence[Subject], setting: Setting, progress: Progress) -> list[Row]:
    """Rows of every phase and of the image; of loading and of the first preview, for subjects that have these."""
    rows = measure(subjects, setting, progress)
    this_machine = machine.describe(setting.gpu)
    for subject in subjects:
        info = subject.info
        load_ms = getattr(subject, "load_ms", None)
        if load_ms is not None:
            rows.append(make_row(info, setting, this_machine, "load", [load_ms]))
        preview = getattr(subject, "first_preview_ms", None)
        if preview is not None and not info.pytorch and info.image_size:
            setting.between()
            progress(f"{info.label}: first preview")
            watch = Watch(process_ids(subject), setting.gpu)
            times = [preview(setting.images, setting.guided) for _ in range(setting.repetitions)]
            rows.append(make_row(info, setting, this_machine, "first_preview", times, summarize([watch.flags()])))
    return rows
