"""Requests of many threads in common calls: where a service has several users, one call makes the images of all.

A call of a batch takes little longer than one of a single image where it waits for memory: its weights are read once
for all. Every image of a model takes the same number of calls, so nothing is gained by letting one join in the middle.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from par_runtime.arguments import number, whole
from par_runtime.errors import BusyError, RequestError
from par_runtime.forks import tell_of_forks
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings, class_index, image_seeds, image_settings
from par_runtime.result import Result

LARGEST_BATCH = 8  #: by default; each larger batch lets its first request wait longer for its image
MOST_WAITING = 256


@dataclass(frozen=True)
class _Request:
    """One image that waits."""

    label: int
    settings: Settings
    seed: int
    since: float  #: time.monotonic()
    future: Future[Result]


class Batcher:
    """Collects the requests that wait for one ``pipeline``, and makes the images of up to ``max_batch`` in one call.

    Any number of threads may call :meth:`submit` and :meth:`generate`. A thread of its own makes the images: whenever
    it is free, it takes the requests that wait, oldest first. Images are those of ``pipeline.generate`` with the same
    label, settings and seed. The pipeline may be used directly too: calls take turns. A copy in a forked process has
    no requests and starts a thread of its own.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        max_batch: int | None = None,
        max_wait_ms: float = 0.0,
        max_waiting: int = MOST_WAITING,
    ) -> None:
        """``max_batch``: most images of a call (default: 8, or fewer where the backend takes fewer). ``max_wait_ms``:
        how long the oldest request waits for others to fill its batch; 0 waits for none, and batches then form while
        a call runs. ``max_waiting``: how many requests may wait; one more is a BusyError. Raises RequestError.
        """
        if not isinstance(pipeline, Pipeline):
            raise RequestError(f"pipeline: expected one of Pipeline.load, not a {type(pipeline).__name__}")
        most, where = pipeline.backend.max_images, f" on {pipeline.backend.info.name}"
        self.pipeline = pipeline
        self.max_batch = (
            min(LARGEST_BATCH, most) if max_batch is None else whole("max_batch", max_batch, 1, most, where)
        )
        self.max_wait_ms = number("max_wait_ms", max_wait_ms, 0, 1e6, "0 to 1000000 milliseconds")
        self.max_waiting = whole("max_waiting", max_waiting, 1)
        self.images, self.calls = 0, 0  #: made until now, and batches that made them
        self._closed = False
        self._begin()
        tell_of_forks(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """Called in a forked process: what waits, waits in the other one."""
        self._begin()
        self.images, self.calls = 0, 0

    # -- asking -------------------------------------------------------------------------------------------------------

    def submit(
        self, label: int | str, settings: Settings | None = None, *, seed: int | None = None, **sampling: Any
    ) -> Future[Result]:
        """Ask for the image of one label; its :class:`Result` is that of the future, when it is made.

        ``settings``, or ``guidance``, ``temperature``, ``top_k``, ``top_p``, ``greedy`` and ``guidance_interval``, as
        for ``Pipeline.generate``; ``seed``: a random one by default. ``asyncio.wrap_future`` makes it one to await. A
        future that is cancelled before its turn costs nothing. What the pipeline raises, the future raises. Functions
        of ``add_done_callback`` run in the thread that makes images, so they should be quick.

        Raises RequestError at once for a bad value, or after :meth:`close`; BusyError where ``max_waiting`` requests
        wait.
        """
        bundle = self.pipeline.bundle
        (each,) = image_settings(bundle, 1, settings, **sampling)
        (first,) = image_seeds(1, seed, None)
        request = _Request(class_index(bundle, label), each, first, time.monotonic(), Future())
        with self._changed:
            if self._closed:
                raise RequestError("submit(): this Batcher was closed; make another one")
            if len(self._waiting) >= self.max_waiting:
                self._waiting = deque(each for each in self._waiting if not each.future.cancelled())
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(
                    f"{self.max_waiting} requests wait already; try again later, or give a larger max_waiting"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="parvis-batcher", daemon=True)
                thread.start()  # it may fail, so nothing waits for it yet
                self._thread = thread
            self._waiting.append(request)
            self._changed.notify_all()
        return request.future

    def generate(
        self, label: int | str, settings: Settings | None = None, *, seed: int | None = None, **sampling: Any
    ) -> Result:
        """The image of one label, as :meth:`submit` makes it; waits until it is made. An interrupted wait (Ctrl-C)
        takes the request back. Raises as :meth:`submit` and ``Pipeline.generate``; also RequestError where the images
        could never be made: in a callback of the pipeline, and in one of a future.
        """
        if self.pipeline._turn.mine or threading.current_thread() is self._thread:
            raise RequestError(
                "generate() was called inside a callback, which the making of its image would wait for; call submit()"
            )
        future = self.submit(label, settings, seed=seed, **sampling)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._waiting)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait until those that wait are made; ``cancel``: cancel these instead.

        The pipeline stays open. A second ``close`` does nothing.
        """
        with self._changed:
            self._closed = True
            dropped = [self._waiting.popleft() for _ in range(len(self._waiting) if cancel else 0)]
            self._changed.notify_all()
            thread = self._thread
        for request in dropped:  # outside of the lock: functions of theirs may call methods of this object
            request.future.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread that makes images ---------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            if batch:  # all may have been cancelled at the last moment
                self._make(batch)

    def _next(self) -> list[_Request] | None:
        """The requests of the next batch, when there are any; None where it was closed and no more wait."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].future.cancelled():
                    self._waiting.popleft()
                if self._waiting:
                    left = self._waiting[0].since + self.max_wait_ms / 1e3 - time.monotonic()
                    if left <= 0 or self._closed or len(self._waiting) >= self.max_batch:
                        return self._taken()
                    self._changed.wait(left)
                elif self._closed:
                    return None
                else:
                    self._changed.wait()

    def _taken(self) -> list[_Request]:
        """The oldest request, and up to ``max_batch`` that go with it, out of those that wait.

        A guidance interval changes the rows of a batch at some call, which an engine cannot do inside of one launch for
        all calls: only requests with the same one share a batch.
        """
        interval = self._waiting[0].settings.guidance_interval
        batch: list[_Request] = []
        others: list[_Request] = []
        for request in self._waiting:
            fits = len(batch) < self.max_batch and request.settings.guidance_interval == interval
            if not fits:
                others.append(request)
            elif request.future.set_running_or_notify_cancel():
                batch.append(request)
        self._waiting = deque(others)
        return batch

    def _make(self, batch: list[_Request]) -> None:
        """Make the images of ``batch``, and hand them over."""
        try:
            results = self.pipeline.generate(
                [request.label for request in batch],
                [request.settings for request in batch],
                seeds=[request.seed for request in batch],
                max_batch=len(batch),
            )
        except BaseException as error:  # of the pipeline; SystemExit where Python ends
            for request in batch:
                request.future.set_exception(error)
            return
        self.images += len(batch)
        self.calls += 1
        for request, result in zip(batch, results, strict=True):
            pixels = None if result.images is None else result.images.copy()  # without those of the others
            request.future.set_result(replace(result, images=pixels, tokens=result.tokens.copy()))
