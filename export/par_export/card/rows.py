"""The rows of a report: our engines, model by model, then PyTorch's twins, the most valuable first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from par_export.card.plan import CODES_N, Block, Model, blocks, label_of
from par_export.card.prepare import Preparation, Twin, that_fit
from par_export.card.session import GRACE_S, Session
from par_runtime.bench.measure import image_ms
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.process import SubjectProcess, open_random

PROBE_CALLS = 16
LOADED_N = 4  #: the n whose loading is a row
#: A twin's image that takes longer is estimated from some of its calls: at n = 1, and eager ones at n = 4. Whole ones
#: would take the time of the rows that come last in a short report.
LONG_MS = 750.0
LEAST_S = 12.0  #: a block that has less time is left out
TWINS_S = 15.0  #: what a block in PyTorch is kept while others are taken before it, or its twins are waited for


class Rows:
    """All rows of ``models``: their engines and twins are prepared meanwhile. Use it in ``with``."""

    def __init__(self, session: Session, models: Sequence[Model]) -> None:
        options = session.options
        self._session = session
        # Beside ours, PyTorch is measured in batches of 1 alone.
        twins = [options.twins and (1 in options.images or not model.ours) for model in models]
        wanted = [model if has else replace(model, twins=()) for model, has in zip(models, twins, strict=True)]
        self._models = that_fit(wanted, session.gpu.memory_bytes)
        for model, kept in zip(wanted, self._models, strict=True):
            for n in sorted({*model.twins} - {*kept.twins}):
                what = f"{label_of(model.name, n)} in PyTorch"
                session.leave_out(
                    what, "it does not fit into this GPU beside all others; --parts baselines measures it"
                )
        work, end = session.work / "models", session.end + GRACE_S
        self._prepared = Preparation(self._models, work, session.build, options.images, options.torch, end)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._prepared.close()

    def run(self, wait: float = 0.0, when_quiet: Callable[[], None] = lambda: None) -> list[Row]:
        """Measure. Until ``wait`` by ``time.monotonic`` engines that are built are waited for, which takes processors.

        ``when_quiet`` is called then, when nothing else is at work, before anything is timed.
        """
        session, rows = self._session, list[Row]()
        for label, engine in self._prepared.engines.items():
            session.progress(f"waiting for the engine of {label}")
            _ended(engine, wait)
        self._prepared.usual_priority()
        with self._prepared.quiet():
            when_quiet()
            session.limits()
        waiting = blocks(self._models, session.options.images)
        while waiting:
            block = self._next(waiting)
            if session.left < LEAST_S:
                session.leave_out(block.name, "time")
                continue
            try:
                rows += self._block(block, self._share(block, waiting))
            except Exception as error:
                session.leave_out(block.name, error)
        return rows

    def _next(self, waiting: list[Block]) -> Block:
        """Take from ``waiting`` the first block whose twins are ready; wait where none is.

        The first block and those of its n keep :data:`TWINS_S` each: one that is further behind is taken only where
        that is left beside it, and nothing is waited for longer. Then the first is taken with what is ready.
        """
        session, first = self._session, waiting[0]
        same = sum((block.twins, block.images) == (first.twins, first.images) for block in waiting)
        while True:
            for place, block in enumerate(waiting):
                if not self._unready(block) and (not place or session.left > TWINS_S * (same + 1)):
                    return waiting.pop(place)
            seconds = session.left - TWINS_S * same
            if seconds <= 0:
                return waiting.pop(0)
            session.progress(f"waiting for {first.name}")
            _first_of([future for block in waiting for future in self._unready(block)], seconds)

    def _unready(self, block: Block) -> list[Future[Twin]]:
        """The twins of a block that are not ready yet."""
        futures = [self._prepared.twins[block.model.name, n, twin] for n, twin in block.twins]
        return [future for future in futures if not future.done()]

    def _share(self, block: Block, waiting: Sequence[Block]) -> float:
        """The part of the time that is left which a block may take before those that are ``waiting``.

        Ours in the first batch share it with ours alone: a ratio without our side is none.
        """
        first = block.model.ours and block.images == self._session.options.images[0]
        others = [other.weight for other in waiting if other.model.ours or not first]
        return block.weight / (block.weight + sum(others))

    def _block(self, block: Block, share: float) -> list[Row]:
        """The rows of a block, which has ``share`` of the time that is left; once more of what is left after loading.

        One in PyTorch has what it was kept at least: a few whole rows are worth more than a sample of each. What cannot
        be loaded is left out, with the reason.
        """
        session, labels = self._session, block.model.labels if block.model.ours else []
        # Its load is a row, so it is loaded alone; after the others, since then the file is in memory, which all n of a
        # model share.
        alone = [label_of(block.model.name, LOADED_N)] if block.loads else []
        with ExitStack() as held:
            until = time.monotonic() + share * session.left
            ours = self._open(block, [label for label in labels if label not in alone], held, until)
            held.enter_context(self._prepared.quiet())
            ours |= self._open(block, [label for label in labels if label in alone], held, until)
            subjects, most_calls = [ours[label] for label in labels if label in ours], dict[str, int]()
            for twin in self._twins(block):
                held.callback(twin.process.close if block.last else partial(_forget, twin.process))
                try:
                    if block.images in twin.failed:
                        raise twin.failed[block.images]
                    most = _most_calls(twin.process, block.images)
                except Exception as error:
                    session.leave_out(f"{twin.process.info.label}, batch {block.images}", error)
                    continue
                subjects.append(twin.process)
                if most is not None:
                    most_calls[twin.process.info.label] = most
            until = time.monotonic() + max(share * session.left, TWINS_S if block.twins else 0.0)
            rows = session.rows(block.name, subjects, session.setting(block.images, until, most_calls))
            return rows + list(self._more(block, ours, rows, alone)) if rows else []

    def _open(self, block: Block, labels: Sequence[str], held: ExitStack, until: float) -> dict[str, SubjectProcess]:
        """Those of our subjects of a block that ``labels`` name, loaded at the same time."""
        session, model, opened = self._session, block.model, dict[str, SubjectProcess]()
        if not labels:
            return opened
        quantised = {label_of(model.name, CODES_N, str(codes)) for codes in model.codes}

        def load(label: str) -> SubjectProcess:
            # What is built last is not waited for: that is the time of the others.
            wait = 1.0 if label in quantised else max(1.0, until - time.monotonic())
            path = self._prepared.engines[label].result(wait)
            return open_random(path, label, device=session.device, end=session.end + GRACE_S)

        session.progress(f"{block.name}: loading")
        with ThreadPoolExecutor(len(labels)) as pool:
            futures = {label: pool.submit(load, label) for label in labels}
            for label, future in futures.items():
                try:
                    opened[label] = future.result()
                    held.callback(opened[label].close)
                except FutureTimeoutError:
                    session.leave_out(label, "its engine was not built in time")
                except Exception as error:
                    session.leave_out(f"{label}, batch {block.images}", error)
        return opened

    def _twins(self, block: Block) -> Iterator[Twin]:
        """The twins of a block that are ready by now."""
        for n, twin in block.twins:
            label = label_of(block.model.name, n, twin)
            future = self._prepared.twins[block.model.name, n, twin]
            if not future.done():
                self._session.leave_out(label, "it was not ready in time")
                continue
            try:
                yield future.result()
            except Exception as error:
                self._session.leave_out(label, error)

    def _more(
        self, block: Block, ours: Mapping[str, SubjectProcess], measured: Sequence[Row], alone: Sequence[str]
    ) -> Iterator[Row]:
        """Beside the rows in turns: what each kernel takes, and loading of those that were loaded ``alone``."""
        session = self._session
        able = {label: ours[label] for label in {row.label: None for row in measured} if label in ours}
        for label, subject in able.items():
            if session.left < 0:
                session.leave_out(f"kernels of {label}, batch {block.images}", "time")
                continue
            session.progress(f"{label}: each kernel")
            try:
                timed = subject.kernels(block.images, True)
            except Exception as error:
                session.leave_out(f"kernels of {label}, batch {block.images}", error)
                continue
            about = {"kind": "kernel", "label": label, "images": block.images}
            session.lines.extend(about | one for one in timed)
        session.keep()
        yield from (session.loaded(subject, block.images) for label, subject in able.items() if label in alone)


def _most_calls(twin: SubjectProcess, images: int) -> int | None:
    """How many calls of an image a twin makes in about :data:`LONG_MS`; None: all, which take no longer."""
    twin.run(images, True, PROBE_CALLS)  # with memory that was just taken, and graphs recorded anew
    took = image_ms(twin.run(images, True, PROBE_CALLS), twin.info)
    calls = twin.info.architecture.calls
    return None if took <= LONG_MS else max(PROBE_CALLS, math.floor(calls * LONG_MS / took))


def _forget(twin: SubjectProcess) -> None:
    """Have the twin free what it holds beside its weights; one that has ended holds nothing."""
    with suppress(Exception):
        twin.forget()


def _first_of(futures: Sequence[Future[Any]], seconds: float) -> None:
    """Wait for the end of one of ``futures``, for ``seconds`` at most."""
    wait_for(futures, seconds, FIRST_COMPLETED)


def _ended(future: Future[Any], until: float) -> None:
    """Wait for the end of ``future``, whatever it is, or for ``until``."""
    try:
        future.exception(max(0.0, until - time.monotonic()))
    except FutureTimeoutError:
        return
