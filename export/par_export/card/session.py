"""What the parts of a GPU's report share: how long each may take, what was found, and how it is written down."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from par_export.card.lines import check, words
from par_export.card.options import CardOptions
from par_export.card.prepare import MakeEngine
from par_export.card.processes import Ended, Line, run_stage
from par_runtime.bench.gpu import Gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.machine import Machine
from par_runtime.bench.measure import Progress, Setting, make_row, rows_in_turns, warm_up
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import SubjectInfo
from par_runtime.bench.subjects.process import SubjectProcess

GRACE_S = 10.0  #: after the end of the report a subject that is still at work is killed
LIMITS_S = 60.0


@dataclass(frozen=True)
class Session:
    """One part of a report, from ``began`` to ``end`` by ``time.monotonic``.

    ``build`` makes the engine of a bundle. The lists and the mapping are those of the whole report.
    """

    options: CardOptions
    gpu: Gpu
    progress: Progress
    journal: Journal
    work: Path
    build: MakeEngine
    machine: Machine
    began: float
    end: float
    lines: list[Line] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    infos: dict[str, SubjectInfo] = field(default_factory=dict)

    def until(self, end: float, work: Path) -> Session:
        """The same report, a part of which begins now and ends at ``end``, with the folder ``work``."""
        return replace(self, began=time.monotonic(), end=end, work=work)

    @property
    def device(self) -> str:
        """As ``Pipeline.load`` takes it."""
        return f"cuda:{self.options.device}"

    @property
    def left(self) -> float:
        """Seconds that are left of this part."""
        return self.end - time.monotonic()

    def share(self, part: float) -> float:
        """When ``part`` of this part's time will have passed."""
        return self.began + part * (self.end - self.began)

    # -- what was found -----------------------------------------------------------------------------------------------

    def leave_out(self, what: str, why: object) -> None:
        """Write down what was not measured, once."""
        text = f"{what}: {words(why)}"
        if text not in self.left_out:
            self.left_out.append(text)
            self.keep()

    def wrong(self, name: str, why: object) -> None:
        """Write down a check that failed."""
        self.lines.append(check(name, False, words(why)))
        self.keep()

    def take(self, name: str, ended: Ended) -> None:
        """Keep the lines of a stage; one that ended before its time is a check that failed."""
        self.lines.extend(ended.lines)
        if ended.why:
            self.wrong(ended.during or name, ended.why)
        self.keep()

    def keep(self) -> None:
        """Have what was found so far written beside the rows, now: this machine may be taken away."""
        self.journal.keep_now()

    # -- measuring ----------------------------------------------------------------------------------------------------

    def limits(self) -> None:
        """Measure what the card allows, unless an earlier part did. Nothing else may be at work."""
        if any(line["kind"] == "limit" for line in self.lines):
            return
        self.progress("the card's limits")
        spec = {"index": self.options.device, "torch": self.options.torch, **self.options.limits}
        ended = run_stage("limits", spec, min(self.end, time.monotonic() + LIMITS_S))
        self.lines.extend(ended.lines)
        self.keep()
        if ended.why:
            self.leave_out("limits", ended.why)

    def setting(self, images: int, until: float = math.inf, most_calls: Mapping[str, int] | None = None) -> Setting:
        """Of rows of batches of ``images``, of which no sample ends after ``until``."""
        return Setting(
            "gpu",
            images,
            repetitions=self.options.repetitions,
            gpu=self.gpu,
            most_calls=most_calls or {},
            keep=self.journal.keep,
            until=min(until, self.end),
        )

    def loaded(self, subject: SubjectProcess, images: int = 1) -> Row:
        """The row of how long ``subject`` took to load, beside its rows of batches of ``images``."""
        return make_row(subject.info, self.setting(images), self.machine, "load", [subject.load_ms])

    def rows(self, name: str, subjects: Sequence[SubjectProcess], setting: Setting) -> list[Row]:
        """The rows of ``subjects`` in turns. Whatever fails is left out, with the reason; ``name`` is said of all."""
        ready = [subject for subject in subjects if self._ready(subject, setting)]
        self.infos.update({subject.info.label: subject.info for subject in ready})
        if not ready:
            return []
        try:
            rows = rows_in_turns(ready, setting, self.progress)
        except Exception as error:  # of the last subject
            self.leave_out(name, error)
            return []
        for label, why in setting.failed.items():
            self.leave_out(f"{label}, batch {setting.images}", why)
        for subject in ready:
            label = subject.info.label
            if label not in setting.failed and not any(row.label == label for row in rows):
                self.leave_out(f"{label}, batch {setting.images}", "time")
        return rows

    def _ready(self, subject: SubjectProcess, setting: Setting) -> bool:
        """Whether a batch that is not counted succeeds."""
        self.progress(f"{subject.info.label}: warming up")
        try:
            warm_up(subject, setting)
        except Exception as error:
            self.leave_out(f"{subject.info.label}, batch {setting.images}", error)
            return False
        return True
