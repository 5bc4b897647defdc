"""The rows of a GPU's report: in which order, of which time, and what is paused meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from par_export.card import prepare
from par_export.card import rows as rows_of_report
from par_export.card.plan import BASELINES, MODELS, TWINS, Figure, Model, blocks, label_of
from par_export.card.rows import TWINS_S, Rows

SIZES = [model for model in MODELS if model.twins]  #: PAR-3B, PAR-L, PAR-XL
LABELS = {label_of(model.name, n, twin) for model in SIZES for n in model.twins for twin in TWINS}
COMPILED_XL = {label_of("PAR-XL", n, "compiled") for n in (1, 4, 16)}


class Subject:
    """In place of a process."""

    def __init__(self, label: str) -> None:
        self.info = SimpleNamespace(label=label)

    def kernels(self, *_: object) -> list[dict[str, Any]]:
        return []

    def forget(self) -> None: ...

    def close(self) -> None: ...


class Prepared:
    """In place of what is prepared: every engine, and the twins of ``ready``, by label."""

    def __init__(self, models: Sequence[Model], ready: Iterable[str], done: list[str]) -> None:
        self.done, self.is_quiet = done, False
        self.engines = {label: Future[Path]() for model in models if model.ours for label in model.labels}
        for label, future in self.engines.items():
            future.set_result(Path(label))
        self.twins = {(m.name, n, twin): Future[Any]() for m in models for n in m.twins for twin in TWINS}
        self.make_ready(ready)

    def make_ready(self, labels: Iterable[str]) -> None:
        for key, future in self.twins.items():
            if label_of(*key) in labels and not future.done():
                future.set_result(prepare.Twin(Subject(label_of(*key)), {}))  # type: ignore[arg-type]

    @contextmanager
    def quiet(self) -> Iterator[None]:
        self.is_quiet = True
        yield
        self.is_quiet = False

    def usual_priority(self) -> None:
        self.done.append("usual priority")

    def close(self) -> None: ...


@dataclass
class Bench:
    """A session without a GPU: what :class:`Rows` do, step by step, is in ``done``, with " (not quiet)" if it is not.

    ``left``: seconds that are left, of which each block takes ``block_s``; ``comes``: twins that become ready when
    something is waited for, one set each time, after 5 seconds.
    """

    models: Sequence[Model]
    ready: set[str]
    left: float
    block_s: float = 10.0
    comes: list[set[str]] = field(default_factory=list)
    images: Sequence[int] = (1,)
    done: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  #: each block was given
    said: list[str] = field(default_factory=list)

    gpu = SimpleNamespace(memory_bytes=None)
    device, work, build, end = "cuda:0", Path(), None, math.inf

    def run(self, monkeypatch: pytest.MonkeyPatch) -> Bench:
        self.prepared = Prepared(self.models, self.ready, self.done)
        self.lines: list[Any] = []
        self.options = SimpleNamespace(twins=True, images=self.images, torch="cuda:0")
        monkeypatch.setattr(rows_of_report, "Preparation", lambda *_: self.prepared)
        monkeypatch.setattr(rows_of_report, "_first_of", self.wait)
        monkeypatch.setattr(rows_of_report, "_most_calls", lambda *_: None)
        monkeypatch.setattr(rows_of_report, "open_random", self.open)
        with Rows(self, self.models) as rows:  # type: ignore[arg-type]
            rows.run(0.0, lambda: self.note("memory"))
        return self

    @property
    def order(self) -> list[str]:
        """The blocks that were measured, by name."""
        return [step.partition(": ")[0] for step in self.done if ": " in step]

    def note(self, what: str) -> None:
        self.done.append(f"{what}{'' if self.prepared.is_quiet else ' (not quiet)'}")

    def open(self, path: Path, label: str, **_: object) -> Subject:
        self.note(f"loads {label}")
        return Subject(label)

    def wait(self, futures: Sequence[Future[Any]], seconds: float) -> None:
        assert not self.prepared.is_quiet
        assert futures
        assert not any(future.done() for future in futures)
        self.left -= 5 if self.comes else seconds
        self.done.append("waits")
        if self.comes:
            self.prepared.make_ready(self.comes.pop(0))

    def progress(self, _: str) -> None: ...

    def keep(self) -> None: ...

    def leave_out(self, what: str, why: object) -> None:
        self.said.append(f"{what}: {why}")

    def limits(self) -> None:
        self.note("limits")

    def setting(self, _: int, until: float, __: object) -> float:
        return until - time.monotonic()

    def rows(self, name: str, subjects: Sequence[Subject], seconds: float) -> list[Any]:
        self.seconds.append(seconds)
        self.note(f"{name}: {', '.join(one.info.label.partition(' n=')[2] for one in subjects)}")
        self.left -= self.block_s
        return [SimpleNamespace(label=one.info.label) for one in subjects]

    def loaded(self, subject: Subject, _: int) -> SimpleNamespace:
        self.note(f"load of {subject.info.label}")
        return SimpleNamespace(label=subject.info.label)


def test_the_plan_has_ours_first_and_figures_that_it_measures() -> None:
    planned_blocks = blocks(MODELS)
    images = [block.images for block in planned_blocks]
    assert images == sorted(images)
    names = [block.name for block in planned_blocks]
    ours = [f"PAR-{size}" for size in ("3B", "L", "XL", "XXL", "L-256")]
    pytorch = [f"PAR-{size} n={n} in PyTorch, batch 1" for n in (4, 16, 1) for size in ("3B", "L", "XL")]
    assert names == [f"{name}, batch 1" for name in ours] + pytorch + [f"{name}, batch 8" for name in ours]
    assert {(block.twins, block.weight, block.last) for block in planned_blocks if "n=4 in" in block.name} == {
        (((4, "compiled"), (4, "eager")), 1.0, True)
    }
    assert MODELS[0].labels == [
        "PAR-3B n=4", "PAR-3B n=16", "PAR-3B n=1", "PAR-3B n=4 int8 group 64", "PAR-3B n=4 int4 group 64"
    ]  # fmt: skip
    assert sum(bool(model.codes) for model in MODELS) == 2
    from par_export.card.plan import FIGURES

    models = {model.name: model for model in MODELS}
    for figure in FIGURES:
        assert isinstance(figure, Figure)
        assert figure.n in models[figure.model].group_sizes
        if figure.what in ("eager", "compiled"):
            assert figure.n in models[figure.model].twins


def test_pytorch_alone_is_planned_n_by_n_in_every_batch_with_equal_parts_of_the_time() -> None:
    planned_blocks = blocks(BASELINES, (1, 8))
    assert [block.name for block in planned_blocks] == [
        f"PAR-{size} n={n} in PyTorch, batch {images}"
        for n in (4, 16, 1) for size in ("3B", "L", "XL") for images in (1, 8)
    ]  # fmt: skip
    assert {block.weight for block in planned_blocks} == {1.0}
    assert [block.last for block in planned_blocks[:2]] == [False, True]


def pytorch(size: str, n: int) -> str:
    return f"PAR-{size} n={n} in PyTorch, batch 1"


def test_ours_are_measured_before_pytorch_whatever_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(SIZES, LABELS, left=50, block_s=12).run(monkeypatch)
    assert bench.order == ["PAR-3B, batch 1", "PAR-L, batch 1", "PAR-XL, batch 1", pytorch("3B", 4)]
    assert bench.said[0] == f"{pytorch('L', 4)}: time"
    assert len(bench.said) == 8
    weights = [block.weight for block in blocks(SIZES, (1,)) if block.model.ours]
    assert bench.seconds[0] == pytest.approx(50 * weights[0] / sum(weights), abs=1)  # nothing of it is PyTorch's


def test_a_block_in_pytorch_has_time_for_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(BASELINES, LABELS, left=60).run(monkeypatch)
    assert min(bench.seconds) == pytest.approx(TWINS_S, abs=1)
    assert bench.order == [pytorch("3B", 4), pytorch("L", 4), pytorch("XL", 4), pytorch("3B", 16), pytorch("L", 16)]


def test_nothing_else_is_at_work_while_something_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([SIZES[0]], LABELS, left=900).run(monkeypatch)
    loads = [step for step in bench.done if step.startswith("loads")]
    assert bench.done[:3] == ["usual priority", "memory", "limits"]
    assert sorted(loads[:4]) == [
        f"loads PAR-3B n={label} (not quiet)" for label in ("1", "16", "4 int4 group 64", "4 int8 group 64")
    ]
    # The last one alone: how long it takes is a row.
    assert bench.done[7:10] == [
        "loads PAR-3B n=4",
        "PAR-3B, batch 1: 4, 16, 1, 4 int8 group 64, 4 int4 group 64",
        "load of PAR-3B n=4",
    ]
    assert bench.done[10:] == [f"{pytorch('3B', n)}: {n} compiled, {n} eager" for n in (4, 16, 1)]


def test_engines_whose_loading_is_no_row_are_loaded_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, all_of_them = Bench([SIZES[0]], LABELS, left=900), threading.Barrier(4)

    def opened(_: Path, label: str, **__: object) -> Subject:
        if label != "PAR-3B n=4":
            all_of_them.wait(20)
        return Subject(label)

    bench.open = opened  # type: ignore[method-assign]
    bench.run(monkeypatch)
    assert bench.said == []


def test_twins_that_are_not_ready_are_measured_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are take their turn meanwhile."""
    bench = Bench(BASELINES, LABELS - COMPILED_XL, left=900, comes=[set(), COMPILED_XL]).run(monkeypatch)
    sizes = [(size, n) for n in (4, 16, 1) for size in ("3B", "L")]
    assert bench.order == [pytorch(*one) for one in (*sizes, ("XL", 4), ("XL", 16), ("XL", 1))]
    assert bench.done.count("waits") == 2
    assert bench.said == []


def test_a_wait_ends_when_the_blocks_of_an_n_need_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured with what is ready, the most valuable first."""
    eager = {label for label in LABELS if label.endswith("eager")}
    bench = Bench(BASELINES, eager, left=100, block_s=TWINS_S).run(monkeypatch)
    measured = [step for step in bench.done if ": " in step]
    assert bench.done[2:4] == ["limits", "waits"]
    assert measured == [f"{pytorch(size, 4)}: 4 eager" for size in ("3B", "L", "XL")]
    assert bench.said[0] == "PAR-3B n=4 compiled: it was not ready in time"
    assert f"{pytorch('3B', 16)}: time" in bench.said


def test_what_is_ready_waits_where_those_before_it_need_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """n = 1 compiles faster than n = 4, which figures are about."""
    first = {label for label in LABELS if " n=1 " in label}
    bench = Bench(BASELINES, first, left=3.5 * TWINS_S, block_s=TWINS_S, comes=[LABELS]).run(monkeypatch)
    assert bench.order == [pytorch(size, 4) for size in ("3B", "L", "XL")]


def test_a_twin_that_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([replace(BASELINES[0], twins=(4,))], {"PAR-3B n=4 eager"}, left=900)

    def fails(*_: object) -> None:
        bench.prepared.twins["PAR-3B", 4, "compiled"].set_exception(RuntimeError("it does not compile"))

    bench.wait = fails  # type: ignore[method-assign]
    bench.run(monkeypatch)
    assert bench.done[-1] == f"{pytorch('3B', 4)}: 4 eager"
    assert bench.said == ["PAR-3B n=4 compiled: it does not compile"]


def test_batches_that_are_larger_come_after_pytorch_unless_it_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    ready, model = {"PAR-3B n=4 eager", "PAR-3B n=4 compiled"}, replace(SIZES[0], twins=(4,))
    for given, order in ((ready, ["1", "PyTorch", "8"]), (set[str](), ["1", "8", "PyTorch"])):
        bench = Bench([model], given, left=900, images=(1, 8), comes=[ready]).run(monkeypatch)
        names = {"1": "PAR-3B, batch 1", "8": "PAR-3B, batch 8", "PyTorch": pytorch("3B", 4)}
        assert bench.order == [names[each] for each in order]
        # Loading is a row of batch 1 alone.
        assert sum(step.startswith("load of") for step in bench.done) == 1
