"""The suites: growing batches, the decoder alone, requests that arrive at random, the first preview."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench.subjects import Scripted, subject_info

from par_runtime.bench.measure import Setting
from par_runtime.bench.subjects.base import PHASES, Sample, TooManyImagesError
from par_runtime.bench.subjects.pipeline import PipelineSubject, phase_at
from par_runtime.bench.suites import serve as serving
from par_runtime.bench.suites.batch import batch
from par_runtime.bench.suites.batch import system as batch_system
from par_runtime.bench.suites.decoder import decoder
from par_runtime.bench.suites.phases import phases
from par_runtime.bench.suites.serve import arrivals, serve, serve_load
from par_runtime.errors import RequestError


def quiet(_: str) -> None:
    pass


@pytest.fixture
def live(tiny: Path) -> Iterator[PipelineSubject]:
    """The committed bundle on the CPU, in this process."""
    subject = PipelineSubject.load(tiny, "parvis", device="cpu", threads=1)
    yield subject
    subject.close()


def test_the_phases_of_a_real_bundle(live: PipelineSubject) -> None:
    rows = phases([live], Setting("phases", repetitions=5), quiet)
    by = {row.phase: row for row in rows}
    bundle = live.pipeline.bundle
    assert list(by) == [*(p for p in PHASES if p in by), "image", "load", "first_preview"]
    assert {phase: by[phase].calls for phase in ("prefill", "sequential", "transition", "group")} == {
        p.name: p.repeat for p in bundle.phases
    }
    for i, whole in enumerate(by["image"].samples_ms):  # the clock's own cost is all that is missing
        assert sum(by[p].samples_ms[i] for p in PHASES) == pytest.approx(whole, rel=0.05)
    assert by["image"].hash == bundle.hash
    assert by["image"].peak_bytes is None or by["image"].peak_bytes > 10**7


def test_some_calls_of_a_real_bundle(live: PipelineSubject) -> None:
    whole, some = live.run(2, True), live.run(2, True, 8)
    assert some.chosen
    assert not whole.chosen
    assert {phase: len(v) for phase, v in some.calls_ms.items() if phase not in ("copy", "decoder")}.keys() == {
        p.name for p in live.info.architecture.phases
    }
    assert sum(len(v) for p, v in some.calls_ms.items() if p not in ("copy", "decoder")) < live.info.architecture.calls
    assert "decoder" in some.calls_ms


def test_images_are_those_that_the_pipeline_makes(live: PipelineSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is production code: the same tokens as ``generate`` gives for the same seeds."""
    made = []
    original = type(live.pipeline).generate
    monkeypatch.setattr(type(live.pipeline), "generate", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    live.run(2, True)
    again = original(live.pipeline, made[0].labels, guidance=made[0].settings[0].guidance, seeds=made[0].seeds)
    assert (made[0].tokens == again.tokens).all()
    assert made[0].settings[0].guided


def test_the_phase_of_a_call(tiny: Path) -> None:
    phases = subject_info(n=4).architecture.phases
    assert [phase_at(phases, p) for p in (0, 1, 3, 4, 8, 572)] == [
        "prefill",
        "sequential",
        "sequential",
        "transition",
        "group",
        "group",
    ]


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that scripted subjects do not need is not asked for."""
    monkeypatch.setattr(batch_system, "available_bytes", lambda: None)


@pytest.mark.usefixtures("plenty")
def test_batches_grow_until_the_plateau() -> None:
    subject = Scripted(subject_info())  # takes (1 + B) / 2: throughput B / (1 + B), so 16 to 32 gives 3 percent
    rows = batch([subject], Setting("batch", repetitions=5), quiet)
    assert [row.images for row in rows] == [1, 2, 4, 8, 16, 32]
    assert all(row.phase == "throughput" for row in rows)
    each = [row.images_per_s or 0.0 for row in rows]
    assert each == sorted(each)
    assert each[1] / each[0] == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.usefixtures("plenty")
def test_batches_end_where_memory_does_and_it_is_reported() -> None:
    reported: list[str] = []
    rows = batch(
        [Scripted(subject_info(), out_of_memory_from=4), Scripted(subject_info("b"))],
        Setting("batch", repetitions=2),
        reported.append,
    )
    assert [row.images for row in rows if row.label == "parvis"] == [1, 2]
    assert max(row.images for row in rows if row.label == "b") > 2
    assert "parvis: 4 images do not fit (4 images)" in reported


def test_batches_that_cannot_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_system, "available_bytes", lambda: 2 * 10**9)
    reported: list[str] = []
    rows = batch([Scripted(subject_info())], Setting("batch", repetitions=2), reported.append)
    assert [row.images for row in rows] == [1, 2, 4]  # 226 MB of keys and values per guided image of PAR-L
    why = "parvis: 8 images do not fit (their caches take 1.8 GB of 2.0 that are free)"
    assert reported[-1] == why
    with pytest.raises(RequestError) as error:
        batch([Scripted(subject_info())], Setting("batch", repetitions=2), quiet, (8, 16))
    assert str(error.value) == f"nothing was measured: {why}"


def test_batches_end_where_the_backend_takes_no_more(live: PipelineSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is built for so many images. What was measured before counts."""
    monkeypatch.setattr(live.pipeline.backend, "max_images", 2)
    reported: list[str] = []
    rows = batch([live], Setting("batch", repetitions=1), reported.append, (1, 2, 4))
    assert [row.images for row in rows] == [1, 2]
    name = live.pipeline.backend.info.name
    assert reported[-1] == f"{live.info.label}: 4 images at once (--images, --batches): {name} takes at most 2"
    with pytest.raises(RequestError, match=r"^nothing was measured: .*: 4 images at once .* takes at most 2$"):
        batch([live], Setting("batch", repetitions=1), quiet, (4,))
    with pytest.raises(TooManyImagesError, match=r"^3 images at once .* takes at most 2$"):
        live.image(3, True)


@pytest.mark.usefixtures("plenty")
def test_sizes_that_are_asked_for_are_all_measured() -> None:
    rows = batch([Scripted(subject_info())], Setting("batch", repetitions=2), quiet, (3, 64, 128))
    assert [row.images for row in rows] == [3, 64, 128]


def test_the_decoder_alone(live: PipelineSubject) -> None:
    rows = decoder([live], Setting("decoder", repetitions=2), quiet, (1, 3))
    assert [(row.phase, row.images) for row in rows] == [("decoder", 1), ("decoder", 3)]
    assert all(row.images_per_s == pytest.approx(1e3 * row.images / row.median_ms) for row in rows)
    with pytest.raises(RequestError, match="no bundle here has a decoder"):
        decoder([Scripted(subject_info())], Setting("decoder"), quiet)


# -- requests that arrive at random -----------------------------------------------------------------------------------


class Waits(Scripted):
    """A batch takes 20 ms, whatever its size."""

    sleep = staticmethod(time.sleep)

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        self.made.append((images, guided, most_calls))
        self.sleep(0.02)
        return Sample({"group": [20.0]}, 20.0)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    at = arrivals(4000, 50.0)
    gaps = np.diff(at)
    assert at[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)
    assert arrivals(3, 1.0) == arrivals(3, 1.0)


class Clock:
    """A time that passes only where somebody sleeps."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now = max(self.now + seconds, math.nextafter(self.now, math.inf))  # some always passes


def test_the_largest_batch_is_tried_first_and_warming_up_ends_in_time() -> None:
    subject = Scripted(subject_info())
    assert serving.full_batch_s(subject, Setting("serve"), 3) > 0
    assert [made[0] for made in subject.made] == [3, 1, 2, 3]
    subject.made.clear()
    assert serving.full_batch_s(subject, Setting("serve"), 1000, seconds=0.0) > 0
    assert [made[0] for made in subject.made] == [1000, 1000]


def test_waiting_requests_make_one_batch_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, clock = Waits(subject_info()), Clock()
    monkeypatch.setattr(serving, "time", clock)
    monkeypatch.setattr(subject, "sleep", clock.sleep)
    latencies, took = serve_load(subject, True, [0.0, 0.001, 0.002, 0.003, 0.004, 0.5], 3, 60)
    assert [images for images, _, _ in subject.made] == [1, 3, 1, 1]
    assert latencies == pytest.approx([20, 39, 38, 37, 56, 20])  # all but the first and the last waited for a batch
    assert took == pytest.approx(0.52)


def test_a_load_is_bounded_in_time() -> None:
    subject = Waits(subject_info())
    latencies, took = serve_load(subject, True, [0.0, 0.05, 30.0], 4, 0.1)
    assert len(latencies) <= 2
    assert took < 20  # it does not wait for the request that is due after its time
    started = time.perf_counter()
    latencies, _ = serve_load(subject, True, [0.0, *[0.12 + i / 100 for i in range(200)]], 1, 0.2)
    assert len(latencies) < 40
    assert time.perf_counter() - started < 30


def test_serve_gives_a_row_per_load(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, clock = Waits(subject_info()), Clock()
    monkeypatch.setattr(serving, "time", clock)
    monkeypatch.setattr(subject, "sleep", clock.sleep)
    rows = serve([subject], Setting("serve"), quiet, largest=4, requests=12)
    offered = [0.3 * 4 / 0.02, 0.6 * 4 / 0.02, 0.9 * 4 / 0.02]  # shares of 4 images in 20 ms
    assert [row.offered_per_s for row in rows] == pytest.approx(offered)
    assert all(row.phase == "serve" and len(row.samples_ms) == 12 and row.images == 4 for row in rows)
    assert all(row.p95_ms >= row.median_ms >= 20 for row in rows)
    for row, rate in zip(rows, offered, strict=True):
        latencies, took = by_hand(arrivals(12, rate), 4)
        assert row.samples_ms == pytest.approx(latencies)
        assert row.images_per_s == pytest.approx(12 / took)
    assert max(row.images_per_s or 0 for row in rows) < 200  # no more than 4 in 20 ms


def by_hand(due: list[float], largest: int) -> tuple[list[float], float]:
    """Latencies in ms of requests that arrive at ``due``, where every batch takes 20 ms, and when the last is done."""
    latencies: list[float] = []
    free = 0.0
    while len(latencies) < len(due):
        first = len(latencies)
        start = max(free, due[first])
        taken = [at for at in due[first : first + largest] if at <= start]
        free = start + 0.02
        latencies += [1e3 * (free - at) for at in taken]
    return latencies, free
