"""The rows of a report: our engines and PyTorch's twins, model by model, the most valuable first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
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
#: A twin's image that takes longer is estimated from some of its calls.
LONG_MS = 1500.0
LEAST_S = 12.0  #: a block that has less time is left out


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

    def run(self, wait: float, when_quiet: Callable[[], None] = lambda: None) -> list[Row]:
        """Measure. Until ``wait`` by ``time.monotonic`` everything that takes processors is waited for.

        ``when_quiet`` is called then, before anything is timed.
        """
        session, rows = self._session, list[Row]()
        self._wait(wait)
        when_quiet()
        session.limits()
        waiting = blocks(self._models, session.options.images)
        while waiting:
            block = waiting.pop(0)
            if session.left < LEAST_S:
                session.leave_out(block.name, "time")
                continue
            share = block.weight / (block.weight + sum(other.weight for other in waiting))
            try:
                rows += self._block(block, share)
            except Exception as error:
                session.leave_out(block.name, error)
        return rows

    def _wait(self, until: float) -> None:
        """Wait until nothing is compiled any more, which takes the processors that launching needs."""
        for (model, n, twin), future in self._prepared.twins.items():
            self._session.progress(f"waiting for {label_of(model, n, twin)}")
            _ended(future, until)
        for engine in self._prepared.engines.values():
            _ended(engine, until)

    def _block(self, block: Block, share: float) -> list[Row]:
        """The rows of a block, which has ``share`` of the time that is left; once more of what is left after loading.

        What cannot be loaded is left out, with the reason.
        """
        session = self._session
        with ExitStack() as held:
            ours = self._open(block, held, time.monotonic() + share * session.left)
            subjects, most_calls = list(ours.values()), dict[str, int]()
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
            until = time.monotonic() + share * session.left
            rows = session.rows(block.name, subjects, session.setting(block.images, until, most_calls))
            return rows + list(self._more(block, ours, rows)) if rows else []

    def _open(self, block: Block, held: ExitStack, until: float) -> dict[str, SubjectProcess]:
        """Our subjects of a block by label, loaded at the same time."""
        session, model, opened = self._session, block.model, dict[str, SubjectProcess]()
        if not model.ours:
            return opened
        quantised = {label_of(model.name, CODES_N, str(codes)) for codes in model.codes}

        def load(label: str) -> SubjectProcess:
            # What is built last is not waited for: that is the time of the others.
            wait = 1.0 if label in quantised else max(1.0, until - time.monotonic())
            path = self._prepared.engines[label].result(wait)
            return open_random(path, label, device=session.device, end=session.end + GRACE_S)

        session.progress(f"{block.name}: loading")
        with ThreadPoolExecutor(1 if block.loads else len(model.labels)) as pool:
            # n = 4 after the others: then the file is in memory, which all n of a model share. Quantised weights last:
            # where memory is short, they are what is left out.
            order = sorted(model.labels, key=lambda label: (label in quantised, label == label_of(model.name, 4)))
            futures = {label: pool.submit(load, label) for label in order}
            for label, future in futures.items():
                try:
                    opened[label] = future.result()
                except FutureTimeoutError:
                    session.leave_out(label, "its engine was not built in time")
                except Exception as error:
                    session.leave_out(f"{label}, batch {block.images}", error)
        for subject in opened.values():
            held.callback(subject.close)
        return {label: opened[label] for label in model.labels if label in opened}

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

    def _more(self, block: Block, ours: Mapping[str, SubjectProcess], measured: Sequence[Row]) -> Iterator[Row]:
        """Beside the rows in turns: loading, the decoder alone, and what each kernel takes."""
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
        if block.loads:
            yield from (session.loaded(subject, block.images) for subject in able.values())


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


def _ended(future: Future[Any], until: float) -> None:
    """Wait for the end of ``future``, whatever it is, or for ``until``."""
    try:
        future.exception(max(0.0, until - time.monotonic()))
    except FutureTimeoutError:
        return
