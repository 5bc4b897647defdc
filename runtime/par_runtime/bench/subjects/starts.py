"""A bundle that is started anew for each sample: what a user waits for between a command and its first image.

The whole is timed by the process that starts the other one, from before it is started until its first image is there;
the parts by that other process itself. What they leave of the whole is the start of Python: the interpreter, and what
is imported before the bundle is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

from par_runtime.bench.subjects.base import Sample
from par_runtime.bench.subjects.pipeline import NOT_IN_A_START
from par_runtime.bench.subjects.process import SubjectProcess
from par_runtime.errors import BundleError

#: Starts a process, and returns when its subject is loaded.
Start = Callable[[], SubjectProcess]


class StartSubject:
    """A bundle whose process ``start`` starts. Raises what it raises.

    The first process tells what it is, and ends at once, so that of several bundles one is in memory at a time. The
    second one makes the image that is not counted (:meth:`warm_up`). So every file that the others read is in the page
    cache, and the bytecode of every module is written.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._process = start()
        self.close()
        self.note, self._first = self._process.note, self._process.info
        self.info = replace(self._first, clock="perf_counter", excluded=NOT_IN_A_START)

    def warm_up(self, images: int, guided: bool) -> None:
        """Start a process, have it make a batch, and end it. Raises as :meth:`run` does."""
        try:
            self._started().image(images, guided)
        finally:
            self.close()

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        """Start a process, have it make two batches, and end it.

        ``calls_ms`` are the parts until the first batch is there, which add up to the whole; ``image_ms`` is the second
        batch. Both are made whole, whatever ``most_calls`` says. Raises what ``Pipeline.load`` and ``generate`` raise;
        BundleError where the process is not what the first one was.
        """
        began = time.perf_counter()
        try:
            first = self._started().image(images, guided)
            whole_ms = 1e3 * (time.perf_counter() - began)
            second = self._process.image(images, guided)
        finally:
            self.close()
        loading = {"load": self._process.load_ms, "selftest": self._process.selftest_ms}
        parts = {part: took for part, took in loading.items() if took is not None} | {"first_image": first.image_ms}
        python_ms = whole_ms - sum(parts.values())
        calls_ms = {part: [took] for part, took in ({"python": python_ms} | parts).items()}
        return Sample(calls_ms, second.image_ms, second.peak_bytes)

    def _started(self) -> SubjectProcess:
        """A process, started now, of the same bundle on the same backend as the first one."""
        self._process = self._start()
        old, new = asdict(self._first), asdict(self._process.info)
        if old != new:
            name = next(name for name in ("hash", *old) if old[name] != new[name])
            what = "was replaced by another bundle" if name == "hash" else f"runs otherwise ({name})"
            before, after = (str(each)[:12] if name == "hash" else each for each in (old[name], new[name]))
            raise BundleError(
                f"{self._process.path}: {what} while its starts were measured: at first {before}, then {after}; leave "
                "it alone, and measure again"
            )
        return self._process

    def close(self) -> None:
        """End the process that runs, if one does."""
        self._process.close()
