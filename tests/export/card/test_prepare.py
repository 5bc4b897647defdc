"""What a report of a GPU prepares: PyTorch's twins, compiled beside the checks and paused while rows are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from small_report import BASELINE, SMALL, options

from par_export.card import plan, prepare
from par_export.card import rows as rows_of_report
from par_export.card.plan import COMPILED, EAGER, MODELS, Model
from par_export.card.report import Report
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.subjects.base import OutOfTimeError
from par_runtime.bench.subjects.process import SubjectProcess
from par_runtime.errors import RequestError


def test_a_twin_without_memory_waits_for_that_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WARM_AGAIN_S", 0.0)
    preparation = prepare.Preparation([], tmp_path, lambda *_: None, (1, 8), "cpu", time.monotonic() + 60)
    done: list[str] = []

    class Process:
        def __init__(self, *outcomes: Exception | None) -> None:
            self.outcomes = list(outcomes)

        def run(self, images: int, guided: bool, most_calls: int) -> None:
            done.append(f"run {images} {guided} {most_calls}")
            outcome = self.outcomes.pop(0)
            if outcome is not None:
                raise outcome

        def forget(self) -> None:
            done.append("forget")

    full, run = MemoryError("full"), f"run 8 True {prepare.WARM_CALLS}"
    for outcomes, error, tries in (
        ([full, full, None], None, 3),
        ([full] * 99, "full", prepare.WARM_TRIES),
        ([MemoryError("killed"), RequestError("ended by itself")], "ended by itself", 2),
        ([RequestError("cannot be compiled"), None], "cannot be compiled", 1),
    ):
        done.clear()
        found = preparation._warm(Process(*outcomes), 8)  # type: ignore[arg-type]
        assert (found if found is None else str(found)) == error
        assert done == [run, *["forget", run] * (tries - 1)]
    preparation.close()
    with pytest.raises(OutOfTimeError):
        preparation._warm(Process(full, full), 8)  # type: ignore[arg-type]


def test_pytorch_is_prepared_only_for_batches_that_it_is_measured_in(
    stand_in: gpu.Gpu, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside ours that is 1: the largest batches are for ours alone."""
    prepared: list[list[tuple[int, ...]]] = []

    def preparation(models: Sequence[Model], *_: object) -> None:
        prepared.append([model.twins for model in models])

    monkeypatch.setattr(rows_of_report, "Preparation", preparation)
    for images, twins in (((1, 8), True), ((8,), True), ((1,), False)):
        set_up = options(tmp_path, tiny, images=images, twins=twins)
        session = Report(set_up, stand_in, lambda _: None, Journal(None, lambda _: None)).session
        rows_of_report.Rows(session, [SMALL, BASELINE])
    assert prepared == [[(4,), (1, 4)], [(), (1, 4)], [(), ()]]


@pytest.mark.parametrize(
    ("gigabytes", "twins"),
    [
        (None, {"PAR-3B": (1, 4, 16), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (150, {"PAR-3B": (1, 4, 16), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (85, {"PAR-3B": (1, 4), "PAR-L": (1, 4, 16), "PAR-XL": (1, 4, 16)}),
        (40, {"PAR-3B": (1, 4), "PAR-L": (1, 4), "PAR-XL": (1, 4)}),
    ],
)
def test_pytorch_gives_up_n_16_of_the_largest_models_where_memory_does_not_hold_all(
    gigabytes: int | None, twins: dict[str, tuple[int, ...]]
) -> None:
    """An H200, an H100 and an A100 of 40 GB, with our engines of one model beside them."""
    kept = prepare.that_fit(MODELS, None if gigabytes is None else gigabytes * 10**9)
    assert {model.name: model.twins for model in kept if model.twins} == twins
    assert [replace(model, twins=()) for model in kept] == [replace(model, twins=()) for model in MODELS]


def test_pytorch_alone_fits_into_80_gb_with_every_n() -> None:
    assert prepare.that_fit(plan.BASELINES, 80 * 10**9) == list(plan.BASELINES)


class Process:
    """In place of a twin's process: what is done with it, and events that hold it where a test wants it."""

    def __init__(self, label: str) -> None:
        self.label, self.done = label, list[str]()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def run(self, *_: object) -> None:
        self.begun.set()
        assert self.may_end.wait(60)

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: self.done.append(name)


class Twins(dict[str, Process]):
    """In place of :func:`open_eager`: the processes by label, which are there once ``load`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.load = threading.Event()
        self.load.set()

    def __call__(self, path: Path, label: str, *, started: Callable[[Process], None], **_: object) -> Process:
        assert self.load.wait(60)
        self[label] = Process(label)
        started(self[label])
        if label == "PAR-S n=16 compiled":
            raise RequestError("it does not load")
        return self[label]


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    opened = Twins()
    monkeypatch.setattr(prepare, "open_eager", opened)
    monkeypatch.setattr(prepare, "family_of", lambda *_: dict.fromkeys((1, 4, 16), Path()))
    return opened


def prepared(tmp_path: Path, *sizes: int) -> prepare.Preparation:
    model = replace(BASELINE, name="PAR-S", twins=sizes, group_sizes=sizes)
    return prepare.Preparation([model], tmp_path, lambda *_, **__: None, (1,), "cpu", time.monotonic() + 60)


def begun(twins: Twins, label: str) -> Process:
    while label not in twins:
        time.sleep(0.01)
    assert twins[label].begun.wait(60)
    return twins[label]


def test_twins_that_are_not_ready_are_paused_while_something_is_timed(twins: Twins, tmp_path: Path) -> None:
    preparation = prepared(tmp_path, 4)
    eager, compiled = (begun(twins, f"PAR-S n=4 {kind}") for kind in (EAGER, COMPILED))
    eager.may_end.set()
    assert preparation.twins["PAR-S", 4, EAGER].result(60).process is eager
    found: list[str] = []

    def interrupted() -> None:
        with preparation.quiet():
            found.extend(compiled.done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert found == ["lower_priority", "pause"]
    assert compiled.done == ["lower_priority", "pause", "go_on"]
    preparation.usual_priority()
    assert eager.done == ["forget", "usual_priority"]
    with preparation.quiet():
        # Its answer was on its way when it was paused. It waits for requests now, so it may be measured.
        compiled.may_end.set()
        assert preparation.twins["PAR-S", 4, COMPILED].result(60).process is compiled
        assert compiled.done[-3:] == ["pause", "forget", "go_on"]
    assert compiled.done[-1] == "go_on"
    preparation.close()
    assert compiled.done[-2:] == eager.done[-2:] == ["kill", "close"]


def test_a_twin_that_starts_meanwhile_is_paused_at_once(twins: Twins, tmp_path: Path) -> None:
    twins.load.clear()
    preparation = prepared(tmp_path, 4)
    with preparation.quiet():
        twins.load.set()
        compiled = begun(twins, f"PAR-S n=4 {COMPILED}")
        assert compiled.done == ["lower_priority", "pause"]
    assert compiled.done[-1] == "go_on"
    for process in twins.values():
        process.may_end.set()
    preparation.close()


def test_a_twin_that_does_not_load_is_not_paused_any_more(twins: Twins, tmp_path: Path) -> None:
    preparation = prepared(tmp_path, 16)
    with pytest.raises(RequestError):
        preparation.twins["PAR-S", 16, COMPILED].result(60)
    with preparation.quiet():
        pass
    assert twins["PAR-S n=16 compiled"].done == ["lower_priority"]
    begun(twins, "PAR-S n=16 eager").may_end.set()
    preparation.close()


def test_a_twin_that_starts_when_the_report_has_ended_is_ended_at_once(twins: Twins, tmp_path: Path) -> None:
    """Nothing waits until it has loaded."""
    twins.load.clear()
    preparation = prepared(tmp_path, 4)
    preparation._closed.set()
    process = Process("late")
    preparation._begins(process, compiled=False)  # type: ignore[arg-type]
    assert process.done == ["kill"]
    twins.load.set()
    preparation.close()


def test_a_report_that_fails_leaves_no_paused_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, which are paused before they have loaded anything."""
    opened: list[SubjectProcess] = []

    def open_apart(
        _: Path, label: str, *, started: Callable[[SubjectProcess], None], end: float, **__: object
    ) -> object:
        rounding = {"arithmetic": "auto", "cache": "auto", "decoder_precision": "auto"}
        spec = {"kind": "bundle", "path": str(tiny), "label": label, "device": "cpu", "threads": 1, "selftest": False}

        def begins(process: SubjectProcess) -> None:
            opened.append(process)
            started(process)

        return SubjectProcess(spec | {"rounding": rounding, "apart": True}, end, begins)

    monkeypatch.setattr(prepare, "open_eager", open_apart)
    monkeypatch.setattr(prepare, "family_of", lambda *_: {4: tiny})
    preparation = prepared(tmp_path, 4)
    with preparation.quiet():
        while len(opened) < 2:
            time.sleep(0.01)
        preparation.close()
    assert all(process._process.returncode is not None for process in opened)
