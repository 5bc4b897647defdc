"""The suite ``http``: ``parvis serve`` as its users meet it, under closed and open loads.

A closed load has so many clients, each of which asks for its next image when it has one. It shows how many images a
second the server makes when there is always something to do. An open load has requests that arrive at random, as in the
suite ``serve``, at shares of the highest throughput of the closed ones. It shows how long a user waits.

Servers run one after the other, each in a process of its own. Its clients are threads of the bench, so they take a part
of the same processors. Both loads count from a request to the last byte of its file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from par_runtime.bench import machine
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Progress, Repetitions, Setting, attempt, make_row, take_turns
from par_runtime.bench.report.words import counted, number
from par_runtime.bench.rows import ENOUGH, Row, few_repetitions, median
from par_runtime.bench.subjects.base import Sample
from par_runtime.bench.subjects.served import PHASE, ServedSubject
from par_runtime.bench.suites.serve import SHARES, arrivals

CLIENTS = (1, 8, 32)  #: of the closed loads
REQUESTS = 64  #: of a repetition of a closed load, and of an open one
SECONDS = 600.0  #: how long one load may take; no request is sent later


def http(
    subjects: Sequence[ServedSubject],
    setting: Setting,
    progress: Progress,
    clients: Sequence[int] = CLIENTS,
    requests: int = REQUESTS,
    seconds: float = SECONDS,
) -> list[Row]:
    """A row per subject and load: the latencies of all requests, and the images a second that were reached.

    A subject that fails is left out while there is another one; raises what the last one's ``start``, loads and
    ``stop`` raise.
    """
    rows: list[Row] = []
    for subject in subjects:
        progress(f"{subject.info.label}: starting its server")
        try:
            if attempt(subject, subjects, setting, partial(subject.start, seconds)):
                loads = _Loads(subject, subjects, setting, progress, requests, seconds)
                closed = [row for count in clients for row in loads.closed(count)]
                rows += closed
                most = max((row.images_per_s or 0.0 for row in closed), default=0.0)
                rows += [row for share in SHARES if most for row in loads.open(share, share * most)]
                attempt(subject, subjects, setting, subject.stop)
        finally:
            subject.close()
    return rows


class _Loads:
    """The loads of one subject; each gives its row, or nothing where the subject has failed."""

    def __init__(
        self,
        subject: ServedSubject,
        subjects: Sequence[ServedSubject],
        setting: Setting,
        progress: Progress,
        requests: int,
        seconds: float,
    ) -> None:
        self._subject, self._subjects, self._setting, self._progress = subject, subjects, setting, progress
        self._requests, self._seconds = requests, seconds
        self._machine = machine.describe(setting.gpu)

    def closed(self, clients: int) -> list[Row]:
        """``clients`` that always ask; before what counts, each asks once."""
        setting, what = self._setting, counted(clients)
        setting.between()
        self._progress(f"{self._subject.info.label}: {what}, warming up")
        attempt(self._subject, self._subjects, setting, partial(self._subject.run, clients, setting.guided))
        end = time.monotonic() + self._seconds

        def sample(subject: ServedSubject) -> Sample:
            requests, left = max(self._requests, clients), max(0.0, end - time.monotonic())
            return subject.closed_load(clients, requests, setting.guided, left)

        make_rows = partial(load_rows, this_machine=self._machine, clients=clients)
        return take_turns(
            [self._subject],
            replace(setting, until=end),
            make_rows,
            self._progress,
            sample,
            others=self._subjects,
            what=what,
        )

    def open(self, share: float, offered: float) -> list[Row]:
        """Requests that arrive at random, ``offered`` a second, once; ``share``: of the most."""
        setting = self._setting
        setting.between()

        def sample(subject: ServedSubject) -> Sample:
            return subject.open_load(arrivals(self._requests, offered), setting.guided, self._seconds)

        return take_turns(
            [self._subject],
            replace(setting, repetitions=1),
            partial(load_rows, this_machine=self._machine, offered=offered),
            self._progress,
            sample,
            others=self._subjects,
            what=f"{number(offered)} requests a second, {share:.0%} of the most",
        )


def load_rows(
    subject: ServedSubject,
    repetitions: Repetitions,
    setting: Setting,
    *,
    this_machine: Machine,
    clients: int | None = None,
    offered: float | None = None,
) -> list[Row]:
    """The row of a load: ``clients`` of a closed one, requests ``offered`` a second of an open one."""
    samples = repetitions.samples
    latencies = [ms for sample in samples for ms in sample.calls_ms[PHASE]]
    rates = [1e3 * len(sample.calls_ms[PHASE]) / sample.image_ms for sample in samples]
    flags = repetitions.summary(setting.repetitions)
    if clients is not None and len(latencies) >= ENOUGH:  # requests of one repetition are no repetitions
        flags = (*few_repetitions(rates, PHASE, setting.suite), *flags)
    row = make_row(
        subject.info,
        replace(setting, images=subject.max_batch),
        this_machine,
        PHASE,
        latencies,
        flags,
        samples,
        images_per_s=median(rates),
        offered_per_s=offered,
        clients=clients,
    )
    return [row]
