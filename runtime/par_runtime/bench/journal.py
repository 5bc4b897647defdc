"""Rows that survive: what a run has measured so far, written while it runs and when it ends before its time.

A run may end in the middle: Ctrl-C, ``timeout``, a terminal that closes, a subject that fails, a disk that is full. So
every suite tells a :class:`Journal` how to make the rows of what it has measured, and the journal keeps these rows in
``FILE.part`` beside the ``FILE`` of --json (or in ``FILE.part2``, where that is taken). That file is written beside its
place and renamed, so a reader never sees half a line, and it is there even after the process was killed. A run that
ends removes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path

from par_runtime.bench.report.output import Outcome, json_lines, write_text
from par_runtime.bench.rows import Row
from par_runtime.system import explain, write_beside

#: Seconds between two times that the file is written.
EVERY_S = 2.0
NOT_ENDED = "the run had not ended when this was written"

MakeRows = Callable[[], Sequence[Row]]


class Journal:
    """The rows of a run so far. ``path``: the file of --json, or None; ``warn`` is given a warning as a line.

    ``finish`` makes an outcome of rows (bounds, predictions); whoever runs the suite sets it. ``failed``: subjects that
    failed while others went on, by label.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None]) -> None:
        self.path = path
        self.part: Path | None = None  #: where the rows are, once some are written
        self.finish: Callable[[Sequence[Row]], Outcome] = lambda rows: Outcome(list(rows), [], [])
        self.failed: dict[str, Exception] = {}
        self._warn: Callable[[str], None] | None = warn
        self._makers: dict[object, MakeRows] = {}
        self._last = time.monotonic()
        self._number: int | None = None  # of the file ``part``, by which it is told from one of another run

    def keep(self, key: object, make: MakeRows) -> None:
        """Take ``make`` for the rows that belong to ``key``, in place of an earlier one; write them if it is time."""
        self._makers[key] = make
        if time.monotonic() - self._last >= EVERY_S:
            self.keep_now()

    def keep_now(self) -> None:
        """Write what there is so far, whatever time it is."""
        if self.path is not None:
            self.write(self.place(self.path))
            self._last = time.monotonic()

    def outcome(self, why: str) -> Outcome:
        """What was measured so far; ``why``: the reason that it is not all."""
        outcome = self.finish([row for make in self._makers.values() for row in make()])
        outcome.stopped = why
        return outcome

    def write(self, part: Path) -> None:
        """Write the rows so far to ``part``. A file that cannot be written is warned of once; the run goes on."""
        outcome = self.outcome(NOT_ENDED)
        if not outcome.rows and not outcome.others:
            return
        try:
            write_beside(part, partial(write_text, json_lines(outcome)))
            self.part, self._number = part, part.stat().st_ino
        except OSError as error:
            if self._warn is not None:
                self._warn(f"rows cannot be kept while they are measured: {explain(error)}")
            self._warn = None

    def place(self, path: Path) -> Path:
        """Where rows for ``path`` go until the run ends: this run's own file, or a name that nothing has."""
        own = self._own() if path == self.path else None
        return part_of(path) if own is None else own

    def _own(self) -> Path | None:
        """``part``, where it still is this run's."""
        with suppress(OSError):
            if self.part is not None and self.part.stat().st_ino == self._number:
                return self.part
        return None

    def remove(self) -> None:
        """Remove the file: the rows are where they belong. That of another run stays."""
        if (own := self._own()) is not None:
            with suppress(OSError):
                own.unlink()


def part_of(path: Path) -> Path:
    """The file in which rows for ``path`` are kept until the run ends: ``FILE.part``, or where there is one already, of
    another run or of the user, ``FILE.part2`` and so on.
    """
    endings = chain([""], map(str, count(2)))
    names = (path.with_name(f"{path.name}.part{ending}") for ending in endings)
    return next(name for name in names if not os.path.lexists(name))
