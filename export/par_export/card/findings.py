"""What the runs of a GPU's report found, and which rows of them count where several runs measured the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from par_export.card.limits import COPY, READ
from par_runtime.bench.machine import Machine
from par_runtime.bench.rows import Row

THIS_RUN = "this run"  #: in place of a file's name
OTHER_COMMIT, OTHER_DRIVER = "other commit", "other driver"


@dataclass
class Findings:
    """Everything that one run found. ``date``: when it began, UTC; ``parts``: what was asked for.

    ``lines``: checks, limits, kernels and notes; ``left_out``: with the reason. ``file``: the name of the file that it
    is in; ``said``: what is wrong with that file, in sentences.
    """

    machine: Machine
    commit: str
    date: str
    minutes: float = 0.0
    rows: Sequence[Row] = ()
    lines: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    parts: Sequence[str] = ()
    file: str = THIS_RUN
    said: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """The checks that failed."""
        return [line for line in self.of("check") if not line["passed"]]

    @property
    def bandwidth(self) -> float | None:
        """GB/s of the card's memory: the faster of copying and reading; None where neither was measured."""
        return max((line["value"] for line in self.of("limit") if line["name"] in (COPY, READ)), default=None)

    @property
    def others(self) -> list[dict[str, Any]]:
        """All but the rows as lines of JSON: the run itself, then what it found, then what it left out.

        Each has the card, the driver, the commit and the date, so that a line is understood alone.
        """
        where = {"gpu": self.machine.gpu, "driver": self.machine.gpu_driver, "commit": self.commit, "date": self.date}
        run = {"kind": "run", "minutes": self.minutes, "parts": list(self.parts), "machine": asdict(self.machine)}
        left_out = [{"kind": "left_out", "text": text} for text in self.left_out]
        return [line | where for line in (run, *self.lines, *left_out)]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a subject is as another. ``value``: None where the two must not be compared.

    ``note``: :data:`OTHER_COMMIT` or :data:`OTHER_DRIVER`, which says so, or "".
    """

    value: float | None
    note: str = ""

    def __str__(self) -> str:
        """ "2.31 x", "2.31 x (other commit)", "other driver"."""
        return noted("" if self.value is None else f"{self.value:.2f} x", self.note)


def noted(text: str, note: str) -> str:
    """``text`` with a ``note``, if there is one."""
    return text if not note else f"{text} ({note})" if text else note


def difference(one: Row, other: Row) -> str:
    """What keeps two rows of one card apart: :data:`OTHER_DRIVER` before :data:`OTHER_COMMIT`, or ""."""
    if one.machine.gpu_driver != other.machine.gpu_driver:
        return OTHER_DRIVER
    return OTHER_COMMIT if one.commit != other.commit else ""


class Known:
    """The rows that count of ``runs`` on one card: of each label, phase and batch the one that was measured last."""

    def __init__(self, runs: Sequence[Findings]) -> None:
        self._rows: dict[tuple[str, str, int], tuple[Row, str]] = {}
        replaced: dict[tuple[str, int, str, str], list[str]] = {}
        for run in runs:
            for row in run.rows:
                key, new = (row.label, row.phase, row.images), (row, run.file)
                old = self._rows.get(key)
                if old is not None:
                    first, last = (old, new) if new[0].date >= old[0].date else (new, old)
                    new = last
                    replaced.setdefault((row.label, row.images, _in(last), _in(first)), []).append(row.phase)
                self._rows[key] = new
        #: A sentence for each subject that was measured more than once.
        self.replaced = [
            f"{label}, batch {images} ({', '.join(phases)}): measured twice; the later counts, {last}, not {first}."
            for (label, images, last, first), phases in replaced.items()
        ]

    @property
    def rows(self) -> list[Row]:
        """In the order in which they were first found."""
        return [row for row, _ in self._rows.values()]

    def file(self, row: Row) -> str:
        """The name of the file that a row is in."""
        return self._rows[row.label, row.phase, row.images][1]

    def get(self, label: str, phase: str, images: int = 1) -> Row | None:
        """The row that counts, if there is one."""
        return self._rows.get((label, phase, images), (None, ""))[0]

    def ratio(self, slow: str, fast: str, images: int = 1) -> Ratio | None:
        """How many times as fast an image of ``fast`` is as one of ``slow``; None where one was not measured."""
        a, b = self.get(slow, "image", images), self.get(fast, "image", images)
        if a is None or b is None:
            return None
        note = difference(a, b)
        return Ratio(None if note == OTHER_DRIVER else a.median_ms / b.median_ms, note)


def _in(found: tuple[Row, str]) -> str:
    """ "rows.jsonl of 2026-02-01T10:00:00Z, commit 0123"."""
    row, file = found
    return f"{file} of {row.date}, commit {row.commit}"


def by_card(runs: Sequence[Findings]) -> Mapping[str, list[Findings]]:
    """Runs by the name of their card."""
    cards: dict[str, list[Findings]] = {}
    for run in runs:
        cards.setdefault(run.machine.gpu or "no GPU", []).append(run)
    return cards
