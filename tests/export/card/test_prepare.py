"""What a report of a GPU prepares: PyTorch's twins, compiled beside the checks and paused while rows are made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from small_report import BASELINE, SMALL, options

from par_export.card import plan, prepare
from par_export.card import rows as rows_of_report
from par_export.card.plan import MODELS, Model
from par_export.card.report import Report
from par_runtime.bench import gpu
from par_runtime.bench.journal import Journal
from par_runtime.bench.subjects.base import OutOfTimeError
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
