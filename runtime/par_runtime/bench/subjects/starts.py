"""A bundle that is started anew for each sample: what a user waits for between a command and its first image.

The whole is timed by the process that starts the other one, from before it is started until its first image is there;
the parts by that other process itself. What they leave of the whole is the start of Python: the interpreter, and what
is imported before the bundle is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from par_runtime.bench.subjects.base import Sample
from par_runtime.bench.subjects.pipeline import NOT_IN_A_START
from par_runtime.bench.subjects.process import SubjectProcess

#: Starts a process, and returns when its subject is loaded.
Start = Callable[[], SubjectProcess]


class StartSubject:
    """A bundle whose process ``start`` starts. Raises what it raises.

    The first process tells what it is, and makes the image that is not counted (:meth:`warm_up`). So every file that
    the others read is in the page cache, and the bytecode of every module is written.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._process = start()
        self.note = self._process.note
        self.info = replace(self._process.info, clock="perf_counter", excluded=NOT_IN_A_START)

    def warm_up(self, images: int, guided: bool) -> None:
        """Make a batch in the first process, and end it. Raises what ``Pipeline.generate`` raises."""
        try:
            self._process.image(images, guided)
        finally:
            self.close()

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Start a process, have it make two batches, and end it.

        ``calls_ms`` are the parts until the first batch is there, which add up to the whole; ``image_ms`` is the second
        batch. Both are made whole, whatever ``most_calls`` says. Raises what ``Pipeline.load`` and ``generate`` raise.
        """
        self.close()
        began = time.perf_counter()
        self._process = self._start()
        try:
            first = self._process.image(images, guided)
            whole_ms = 1e3 * (time.perf_counter() - began)
            second = self._process.image(images, guided)
        finally:
            self.close()
        loading = {"load": self._process.load_ms, "selftest": self._process.selftest_ms}
        parts = {part: took for part, took in loading.items() if took is not None} | {"first_image": first.image_ms}
        python_ms = whole_ms - sum(parts.values())
        calls_ms = {part: [took] for part, took in ({"python": python_ms} | parts).items()}
        return Sample(calls_ms, second.image_ms, second.peak_bytes)

    def close(self) -> None:
        """End the process that runs, if one does."""
        self._process.close()
