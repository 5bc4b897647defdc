"""Rows that survive: what a run has measured so far, written while it runs and when it ends before its time.

A run may end in the middle: Ctrl-C, ``timeout``, a terminal that closes, a subject that fails, a disk that is full. So
every suite tells a :class:`Journal` how to make the rows of what it has measured, and the journal keeps these rows in
``FILE.part`` beside the ``FILE`` of --json. That file is written beside its place and renamed, so a reader never sees
half a line, and it is there even after the process was killed. A run that ends removes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from par_runtime.bench.report.output import Outcome, json_lines, write_text
from par_runtime.bench.rows import Row, plain_lines
from par_runtime.errors import RequestError
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
        self.path, self.part = path, None if path is None else part_of(path)
        self.finish: Callable[[Sequence[Row]], Outcome] = lambda rows: Outcome(list(rows), [], [])
        self.failed: dict[str, Exception] = {}
        self._warn: Callable[[str], None] | None = warn
        self._makers: dict[object, MakeRows] = {}
        self._last = time.monotonic()
        self._written: int | None = None  # the number of the file that was written last

    def keep(self, key: object, make: MakeRows) -> None:
        """Take ``make`` for the rows that belong to ``key``, in place of an earlier one; write them if it is time."""
        self._makers[key] = make
        if time.monotonic() - self._last >= EVERY_S:
            self.keep_now()

    def keep_now(self) -> None:
        """Write what there is so far, whatever time it is."""
        if self.part is not None:
            self.write(self.part)
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
            self._written = part.stat().st_ino
        except OSError as error:
            if self._warn is not None:
                self._warn(f"rows cannot be kept while they are measured: {explain(error)}")
            self._warn = None

    def remove(self) -> None:
        """Remove the file: the rows are where they belong. That of another run stays."""
        if self.part is not None and self._written is not None:
            with suppress(OSError):
                if self.part.stat().st_ino == self._written:
                    self.part.unlink()


def part_of(path: Path) -> Path:
    """The file in which the rows for ``path`` are kept until the run ends."""
    return path.with_name(path.name + ".part")


def check_kept(path: Path) -> None:
    """Raise RequestError where a file is in the place of that which keeps the rows for ``path``, and holds no rows."""
    part = part_of(path)
    if not os.path.lexists(part):
        return
    try:
        lines, broken = plain_lines(part, RequestError)
        rows = bool(lines) and not broken and all(isinstance(plain, dict) and "kind" in plain for _, plain in lines)
    except RequestError:
        rows = False
    if not rows:
        raise RequestError(
            f"{part} is there and holds no rows of 'parvis bench', which for {path} are kept there until the run ends; "
            "move it away, or give --json another name"
        )
