"""Requests of many threads in common calls: where a service has several users, one call makes the images of all.

A call of a batch takes little longer than one of a single image where it waits for memory: its weights are read once
for all. Every image of a model takes the same number of calls, so nothing is gained by letting one join in the middle.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import NoReturn

from par_runtime.arguments import number, whole
from par_runtime.errors import BusyError, RequestError
from par_runtime.forks import tell_of_forks
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings, class_index, image_seeds, image_settings
from par_runtime.result import Result

log = logging.getLogger(__name__)

LARGEST_BATCH = 8  #: by default; each larger batch lets its first request wait longer for its image
MOST_WAITING = 256


class _Promise(Future[Result]):
    """A future whose ``dropped`` says that it was cancelled, without its lock, which Ctrl-C in its owner may tear."""

    dropped = False

    def cancel(self) -> bool:
        self.dropped = super().cancel() or self.dropped
        return self.dropped


@dataclass(frozen=True)
class _Request:
    """One image that waits."""

    label: int
    settings: Settings
    seed: int
    since: float  #: time.monotonic()
    future: _Promise


class Batcher:
    """Collects the requests that wait for one ``pipeline``, and makes the images of up to ``max_batch`` in one call.

    Any number of threads may call :meth:`submit` and :meth:`generate`. A thread of its own makes the images: whenever
    it is free, it takes the requests that wait, oldest first. Images are those of ``pipeline.generate`` with the same
    label, settings and seed. The pipeline may be used directly too: calls take turns. :meth:`close` ends the thread; so
    does forgetting the object, when what waits is made. A copy in a forked process has no requests, and a thread of its
    own: what was asked for before the fork is made in the process that asked.
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
        pipeline._turn.check_open("Batcher()")
        most, where = pipeline.backend.max_images, f" on {pipeline.backend.info.name}"
        self.pipeline = pipeline
        self.max_batch = (
            min(LARGEST_BATCH, most) if max_batch is None else whole("max_batch", max_batch, 1, most, where)
        )
        self.max_wait_ms = number("max_wait_ms", max_wait_ms, 0, 1e6, "0 to 1000000 milliseconds")
        self.max_waiting = whole("max_waiting", max_waiting, 1)
        self._begin()
        tell_of_forks(self)

    def _begin(self) -> None:
        self._worker = _Worker(self.pipeline, self.max_batch, self.max_wait_ms / 1e3)
        weakref.finalize(self, self._worker.end).atexit = False

    def after_fork(self) -> None:
        """Called in a forked process, where the thread does not exist."""
        closing = self._worker.closing
        self._begin()
        self._worker.closing = closing

    def __reduce__(self) -> NoReturn:
        """Raise RequestError: two of them would share the requests that wait."""
        raise RequestError("a Batcher cannot be copied or sent to another process; make another one")

    def submit(
        self,
        label: int | str,
        settings: Settings | None = None,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        guidance_interval: int | None = None,
        seed: int | None = None,
    ) -> Future[Result]:
        """Ask for the image of one label; its :class:`Result` is that of the future, when it is made.

        Settings as for ``Pipeline.generate``; ``seed``: a random one by default. ``asyncio.wrap_future`` makes it one
        to await. A future that is cancelled before its turn costs nothing. What the pipeline raises, the future raises.
        ``timings`` are those of the whole call. Functions of ``add_done_callback`` run in the thread that makes images,
        so they should be quick.

        Raises RequestError at once for a bad value, or after :meth:`close`; BusyError where ``max_waiting`` requests
        wait.
        """
        (each,) = image_settings(
            self.pipeline.bundle,
            1,
            settings,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            guidance_interval=guidance_interval,
        )
        (first,) = image_seeds(1, seed, None)
        request = _Request(class_index(self.pipeline.bundle, label), each, first, time.monotonic(), _Promise())
        self.pipeline._turn.check_open("submit()")
        self._worker.take(request, self.max_waiting)
        return request.future

    def generate(
        self,
        label: int | str,
        settings: Settings | None = None,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        guidance_interval: int | None = None,
        seed: int | None = None,
    ) -> Result:
        """The image of one label, as :meth:`submit` makes it; waits until it is made. An interrupted wait (Ctrl-C)
        takes the request back. Raises as :meth:`submit` and ``Pipeline.generate``; also RequestError where the images
        could never be made: in a callback of the pipeline, and in one of a future.
        """
        self._check_may_wait("generate", "submit() may be called there")
        future = self.submit(
            label,
            settings,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            guidance_interval=guidance_interval,
            seed=seed,
        )
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return self._worker.waiting

    @property
    def images(self) -> int:
        """How many images were made until now, in this process."""
        return self._worker.images

    @property
    def calls(self) -> int:
        """How many calls of the pipeline made them."""
        return self._worker.calls

    def close(self, *, cancel: bool = False, wait: bool = True) -> None:
        """Take no more requests, and wait until those that wait are made; ``cancel``: cancel these instead. Without
        ``wait`` they are made while the caller goes on.

        The pipeline stays open. A second ``close`` waits too, where the first one was interrupted. In a callback of a
        future it does not wait. Raises RequestError in a callback of the pipeline.
        """
        worker = self._worker
        if not wait or worker.thread is threading.current_thread():
            worker.close(cancel)
            return
        self._check_may_wait("close", "call it afterwards")
        worker.close(cancel)
        if worker.thread is not None:
            worker.ended.wait()

    def _check_may_wait(self, name: str, advice: str) -> None:
        if self.pipeline._turn.mine or threading.current_thread() is self._worker.thread:
            raise RequestError(
                f"{name}() was called inside a callback, and would wait for images that wait for its end; {advice}"
            )

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The requests that wait, and the thread that makes them. It does not know its Batcher, which may be forgotten."""

    def __init__(self, pipeline: Pipeline, max_batch: int, max_wait_s: float) -> None:
        self._pipeline, self._max_batch, self._max_wait_s = pipeline, max_batch, max_wait_s
        self._lock = threading.Lock()  # "with" on it cannot be torn by Ctrl-C, unlike on a Condition
        self._requests: deque[_Request] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()  # may be used in any moment, also while memory is freed
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        self.closing = False
        self.images, self.calls = 0, 0

    @property
    def waiting(self) -> int:
        with self._lock:
            return self._alive()

    def _alive(self) -> int:
        return sum(not request.future.dropped for request in self._requests)

    def take(self, request: _Request, most: int) -> None:
        """Let ``request`` wait for its turn. Raises RequestError, BusyError."""
        with self._lock:
            if self.closing:
                raise RequestError("submit(): this Batcher was closed; make another one")
            if len(self._requests) >= most and self._alive() >= most:
                raise BusyError(f"{most} requests wait already; try again later, or give a larger max_waiting")
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="parvis-batcher", daemon=True)
                try:
                    self.thread.start()
                except BaseException:  # no more threads, or Ctrl-C: one that runs all the same sees that it is not this
                    self.thread = None
                    raise
            self._requests.append(request)
        self._wake.put(None)

    def end(self) -> None:
        """Take no more requests. It takes no lock, so it may be called in any moment."""
        self.closing = True
        self._wake.put(None)

    def close(self, cancel: bool) -> None:
        with self._lock:
            self.closing = True
            waiting = list(self._requests) if cancel else []
        for request in waiting:  # _next drops them; where this is interrupted, the others are made
            request.future.cancel()
        self._wake.put(None)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._make(batch)
            del batch  # or its images would be kept until the next ones
        if self.thread is threading.current_thread():
            self.ended.set()

    def _next(self) -> list[_Request] | None:
        """The requests of the next batch, when there are any; None where it was closed and no more wait."""
        while True:
            dropped: list[_Request] = []
            left: float | None = None
            with self._lock:
                if self.thread is not threading.current_thread():
                    return None
                for request in list(self._requests):
                    if request.future.dropped:
                        self._requests.remove(request)
                        dropped.append(request)
                if self._requests:
                    left = self._requests[0].since + self._max_wait_s - time.monotonic()
                    if left <= 0 or self.closing or len(self._requests) >= self._max_batch:
                        return self._batch()
                elif self.closing and not dropped:
                    return None
            for request in dropped:  # whoever waits for several futures is told
                _safely(request.future.set_running_or_notify_cancel)
            if not dropped:
                with suppress(Empty):
                    self._wake.get(timeout=left)

    def _batch(self) -> list[_Request]:
        """The oldest request, and up to ``max_batch`` that go with it, out of those that wait.

        A guidance interval changes the rows of a batch at some call, which an engine cannot do inside of one launch for
        all calls: only requests with the same one share a batch.
        """
        interval = self._requests[0].settings.guidance_interval
        fitting = [request for request in self._requests if request.settings.guidance_interval == interval]
        batch = fitting[: self._max_batch]
        taken = {id(request) for request in batch}
        self._requests = deque(request for request in self._requests if id(request) not in taken)
        return batch

    def _make(self, waited: list[_Request]) -> None:
        """Make the images of a batch, and hand them over."""
        batch = [request for request in waited if _safely(request.future.set_running_or_notify_cancel)]
        if not batch:  # all were cancelled at the last moment
            return
        try:
            results = self._pipeline.generate(
                [request.label for request in batch],
                [request.settings for request in batch],
                seeds=[request.seed for request in batch],
                max_batch=len(batch),
            )
        except BaseException as error:  # of the pipeline; SystemExit where Python ends
            for request in batch:
                _safely(lambda request=request, error=error: request.future.set_exception(_own(error)))
            return
        self.images += len(batch)
        self.calls += 1
        for request, each in zip(batch, results, strict=True):
            pixels = None if each.images is None else each.images.copy()  # without those of the others
            own = replace(each, images=pixels, tokens=each.tokens.copy(), timings=dict(each.timings))
            _safely(lambda request=request, own=own: request.future.set_result(own))


def _safely(work: object) -> object:
    """What ``work``, a method of a future, returns. Functions of its owner run in it, and its owner may have ended it:
    whatever it raises, SystemExit too, is of that request alone, and must not end the thread.
    """
    try:
        return work()  # type: ignore[operator]
    except BaseException:
        log.exception("a callback of a request has failed")
        return False


def _own(error: BaseException) -> BaseException:
    """``error`` for one more thread to raise: each writes where it was raised into its own one."""
    try:
        own = copy.copy(error)
    except Exception:
        return error
    if type(own) is not type(error):
        return error
    own.__cause__ = error
    return own
