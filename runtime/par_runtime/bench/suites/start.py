"""The suite ``start``: what a user waits for between a command and its first image, each time in a new process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from par_runtime.bench import machine
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Progress, Repetitions, Setting, attempt, make_row, take_turns
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import STARTING, Subject


def start(subjects: Sequence[Subject], setting: Setting, progress: Progress) -> list[Row]:
    """Rows of every part of a start, of the whole, and of a second image in the same process.

    ``subjects`` are started anew for each sample (``subjects/starts.py``), after two starts that are not counted.
    """
    for subject in subjects:
        progress(f"{subject.info.label}: warming up")
        attempt(subject, subjects, setting, partial(_warm_up, subject, setting))
    return take_turns(subjects, setting, partial(start_rows, this_machine=machine.describe(setting.gpu)), progress)


def _warm_up(subject: Any, setting: Setting) -> None:
    subject.warm_up(setting.images, setting.guided)


def start_rows(subject: Subject, repetitions: Repetitions, setting: Setting, this_machine: Machine) -> list[Row]:
    """One row per part that the subject has, one of their sum, and one of the second image."""
    info, samples = subject.info, repetitions.samples
    times = {part: [sum(s.calls_ms[part]) for s in samples] for part in STARTING if part in samples[0].calls_ms}
    times["start"] = [sum(parts) for parts in zip(*times.values(), strict=True)]
    times["image"] = [sample.image_ms for sample in samples]
    flags = repetitions.summary(setting.repetitions)
    calls = {"first_image": info.architecture.calls, "image": info.architecture.calls}
    return [
        make_row(info, setting, this_machine, phase, each, flags, samples, calls=calls.get(phase))
        for phase, each in times.items()
    ]
