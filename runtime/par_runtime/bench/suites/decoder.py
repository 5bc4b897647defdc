"""The suite ``decoder``: the image decoder alone, by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from par_runtime.bench import machine
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Progress, Repetitions, Setting, attempt, make_row, take_turns
from par_runtime.bench.rows import Row, median
from par_runtime.bench.subjects.base import Sample, Subject
from par_runtime.errors import RequestError

BATCHES = (1, 2, 4, 8)


def _decode(subject: Any, images: int) -> Sample:
    sample: Sample = subject.decode(images)
    return sample


def decoder(
    subjects: Sequence[Subject], setting: Setting, progress: Progress, sizes: Sequence[int] | None = None
) -> list[Row]:
    """A row per subject and batch size. Raises RequestError if no subject has a decoder."""
    able: list[Any] = [s for s in subjects if s.info.image_size is not None and hasattr(s, "decode")]
    if not able:
        raise RequestError("--suite decoder: no bundle here has a decoder; export one with a tokenizer")
    make_rows = partial(decoder_rows, this_machine=machine.describe(setting.gpu))
    rows = []
    for size in sizes or BATCHES:
        sized = replace(setting, images=size)
        for subject in able:
            attempt(subject, able, sized, partial(_decode, subject, size))
        rows += take_turns(able, sized, make_rows, progress, partial(_decode, images=size))
    return rows


def decoder_rows(subject: Subject, repetitions: Repetitions, setting: Setting, this_machine: Machine) -> list[Row]:
    """The row of decoding batches of one size."""
    times = [sum(sample.calls_ms["decoder"]) for sample in repetitions.samples]
    row = make_row(
        subject.info,
        setting,
        this_machine,
        "decoder",
        times,
        repetitions.summary(setting.repetitions),
        repetitions.samples,
        calls=len(repetitions.samples[0].calls_ms["decoder"]),
        images_per_s=1e3 * setting.images / median(times),
    )
    return [row]
