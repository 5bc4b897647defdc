"""Measuring: turns, estimates of a whole image, the bound of a phase, and the flags of disturbances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
from bench.subjects import MACHINE, Scripted, one_row, rows_from, subject_info

from par_runtime.bench import measure
from par_runtime.bench.bounds import with_bounds
from par_runtime.bench.limits import Limits
from par_runtime.bench.measure import Repetitions, Setting, least_work, make_row, phase_rows, summarize, take_turns
from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import Sample, spread_calls
from par_runtime.cost.architecture import named_architecture, phases_of
from par_runtime.cost.bound import bound
from par_runtime.cost.work import image_work
from par_runtime.errors import RequestError

LIMITS = Limits(((2**20, 100.0), (2**30, 20.0)), 0.1, "measured: by hand")


def test_subjects_take_turns_after_a_short_warm_up() -> None:
    order: list[str] = []

    class Ordered(Scripted):
        def run(self, images, guided, most_calls=None):  # type: ignore[no-untyped-def]
            order.append(f"{self.info.label}{'' if most_calls is None else ' short'}")
            return super().run(images, guided, most_calls)

    rows = measure.measure([Ordered(subject_info("a")), Ordered(subject_info("b"))], Setting("phases", repetitions=3))
    assert order == ["a short", "b short", *["a", "b"] * 3]
    assert [row.phase for row in rows if row.label == "a"] == [
        "prefill",
        "sequential",
        "transition",
        "group",
        "copy",
        "image",
    ]
    assert all(len(row.samples_ms) == 3 for row in rows)


def test_phases_add_up_to_the_image() -> None:
    rows = rows_from(Scripted(subject_info(), drift=(1.0, 1.5, 0.7, 2.0, 1.1)))
    parts = [row for row in rows if row.phase != "image"]
    image = next(row for row in rows if row.phase == "image")
    for i, whole in enumerate(image.samples_ms):
        assert sum(row.samples_ms[i] for row in parts) == pytest.approx(whole)
    assert image.calls == 147
    assert {row.phase: row.calls for row in parts} == {
        "prefill": 1,
        "sequential": 3,
        "transition": 1,
        "group": 142,
        "copy": 1,
    }


@pytest.mark.parametrize("n", [1, 4, 16])
def test_some_calls_stand_for_all(n: int) -> None:
    subject = Scripted(subject_info(n=n), call_ms={"prefill": 5.0, "sequential": 3.0, "transition": 4.0, "group": 2.0})
    whole = rows_from(subject, 1)
    setting = Setting("phases", repetitions=1, most_calls={"parvis": 20})
    some = take_turns([subject], setting, partial(phase_rows, this_machine=MACHINE))
    assert [row.median_ms for row in some if row.phase != "copy"] == pytest.approx(
        [row.median_ms for row in whole if row.phase != "copy"], rel=0.02
    )
    assert "estimated" in some[-1].marks
    assert f"of {subject.info.architecture.calls} calls were made" in some[-1].flags[1]
    assert not any("estimated" in row.marks for row in whole)


@pytest.mark.parametrize(("n", "most"), [(1, 8), (1, 100), (4, 8), (4, 40), (16, 12), (16, 30)])
def test_chosen_calls_are_spread_over_every_phase(n: int, most: int) -> None:
    phases = phases_of(n, 576)
    chosen = spread_calls(phases, most)
    assert chosen is not None
    assert len(chosen) <= most + 4
    first = 0
    for phase in phases:
        mine = sorted(i - first for i in chosen if first <= i < first + phase.repeat)
        assert len(mine) >= min(2, phase.repeat)
        if mine:  # their mean place is the phase's middle: later calls see more keys
            assert sum(mine) / len(mine) == pytest.approx((phase.repeat - 1) / 2, abs=1.0)
        first += phase.repeat
    assert spread_calls(phases, 576) is None
    assert spread_calls(phases, None) is None


def test_the_bound_takes_the_bandwidth_of_what_a_call_reads() -> None:
    rows = with_bounds(rows_from(Scripted(subject_info())), {"parvis": subject_info()}, {2: LIMITS})
    image = next(row for row in rows if row.phase == "image")
    calls = image_work(named_architecture("PAR-L", 4), 1, True, 4.0, 4.0)
    assert image.read_gb_s == 20.0  # 1.3 GB a call, beyond the largest array
    assert image.bound_ms == pytest.approx(bound(calls, 20.0, 0.1).ms)
    assert image.percent_of_bound == pytest.approx(100 * image.bound_ms / image.median_ms)
    group = next(row for row in rows if row.phase == "group")
    # 325 M parameters of 4 bytes at 20 GB/s are 65 ms; 8 positions are 52 ms at 0.1 TFLOP/s.
    assert group.bound_by == "bandwidth"
    assert group.bound_ms is not None
    assert group.bound_ms / 142 == pytest.approx(65 + 6, rel=0.02)  # the keys of two rows: 113 MB on average
    assert group.gb_s == pytest.approx(group.bytes / group.median_ms / 1e6)  # type: ignore[operator]
    assert next(row for row in rows if row.phase == "copy").bound_ms is None
    wide = replace(subject_info(n=16), label="parvis")
    by = [
        row.bound_by
        for row in with_bounds(rows_from(Scripted(wide)), {"parvis": wide}, {2: LIMITS})
        if row.phase == "group"
    ]
    assert by == ["compute"]  # 32 positions


def test_rows_without_their_own_threads_limits_stay_without_a_bound() -> None:
    rows = rows_from(Scripted(subject_info()))
    assert with_bounds(rows, {"parvis": subject_info()}, {4: LIMITS}) == rows


def test_a_flag_states_how_often_and_how_bad() -> None:
    flags = [
        (),
        ("busy: other processes took 9 % of the CPU time",),
        ("busy: other processes took 31 % of the CPU time", "debug: a tracer"),
    ]
    assert summarize(flags) == ("busy: in 2 of 3, other processes took 31 % of the CPU time", "debug: a tracer")
    assert summarize([(), ()]) == ()


def test_what_disturbs_short_repetitions_shows_over_all_of_them() -> None:
    busy = "busy: other processes took 30 % of the CPU time"
    assert Repetitions([], [(), ()], (busy, "debug: x")).summary(0) == (busy, "debug: x")
    assert Repetitions([], [(busy,), ()], ("busy: other processes took 9 % of the CPU time",)).summary(0) == (
        "busy: in 1 of 2, other processes took 30 % of the CPU time",
    )


class Fails(Scripted):
    """Fails at its fourth batch, the third repetition."""

    def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
        if len(self.made) == 3:
            raise RequestError("the process of b ended by itself")
        return super().run(images, guided, most_calls)


def test_a_subject_that_fails_leaves_the_others_and_its_own_samples() -> None:
    setting = Setting("phases", repetitions=5)
    rows = measure.measure([Scripted(subject_info("a")), Fails(subject_info("b"))], setting)
    images = {row.label: row for row in rows if row.phase == "image"}
    assert {label: len(row.samples_ms) for label, row in images.items()} == {"a": 5, "b": 2}
    assert "incomplete: 2 of 5 repetitions were made before it ended" in images["b"].flags
    assert "incomplete" not in images["a"].marks
    assert {label: str(error) for label, error in setting.failed.items()} == {"b": "the process of b ended by itself"}


def test_the_last_subject_that_fails_ends_the_run() -> None:
    with pytest.raises(RequestError, match="ended by itself"):
        measure.measure([Fails(subject_info("b")), Fails(subject_info("c"))], Setting("phases", repetitions=5))


def test_rows_can_be_made_at_any_time() -> None:
    """What is kept gives the rows of all samples so far, from the first one on."""
    kept: dict[object, Callable[[], Sequence[Row]]] = {}
    seen: list[int] = []

    class Looks(Scripted):
        def run(self, images: int, guided: bool, most_calls: int | None = None) -> Sample:
            seen.extend(len(row.samples_ms) for make in kept.values() for row in make() if row.phase == "image")
            return super().run(images, guided, most_calls)

    subjects = [Scripted(subject_info("a")), Looks(subject_info("b"))]
    setting = Setting("phases", repetitions=3, keep=kept.__setitem__)
    rows = measure.rows_in_turns(subjects, setting, lambda _: None)
    assert seen == [1, 2, 1, 3, 2]  # a, then a and b
    (again,) = (make() for make in kept.values())
    assert [(row.label, row.phase, row.samples_ms) for row in again] == [
        (row.label, row.phase, row.samples_ms) for row in rows
    ]


def test_few_repetitions_are_marked() -> None:
    flag = "few repetitions: 3 instead of 5 or more, so the spread says little"
    assert rows_from(Scripted(subject_info()), 3)[-1].flags == (flag,)
    assert one_row([80.0], phase="load").flags == ()  # one is all there is
    assert rows_from(Scripted(subject_info()), 5)[-1].flags == ()


def test_a_decoder_in_winograds_form_may_need_fewer_operations_than_its_convolutions() -> None:
    """Else a row of it would be faster than its bound."""
    architecture = replace(named_architecture("PAR-L", 4), decoder_parameters=10**6, decoder_operations=144 * 10**9)
    sizes = {"architecture": architecture, "image_size": (384, 384)}
    for decoder, computes, operations, per_clip in (
        ("onnxruntime-cpu 1.32.0", "fp32", 144e9, 144e9),
        ("native-cpu 0.1.0 (avx512)", "fp32", 25e9, 36e9),
        ("native-cpu 0.1.0 (avx512, amx, bf16)", "bf16", 64e9, 144e9),  # no Winograd: 4 of 9 behind an upsampling
        ("native-cpu 0.1.0 (avx512, bf16)", "bf16", 25e9, 36e9),
    ):
        info = subject_info(decoder=decoder, decoder_computes=computes, **sizes)
        assert sum(work.operations for work in least_work(info, 2, True, "decoder")) == 2 * operations
        clips = replace(info, grid=(5, 8, 8))
        assert sum(work.operations for work in least_work(clips, 2, True, "decoder")) == 2 * per_clip
        image, calls = (least_work(info, 1, True, phase) for phase in ("image", "group"))
        assert image[-1].operations == operations
        assert least_work(subject_info(), 1, True, "group") == calls


@pytest.mark.parametrize("computes", ["fp32", "bf16"])
def test_a_decoder_beside_a_rounded_step_computes_by_itself(computes: str) -> None:
    """So its row is bound by the peak of its own precision."""
    decoder = {"decoder": "native-cpu 0.1.0 (avx512)", "decoder_computes": computes, "image_size": (384, 384)}
    info = subject_info(computes="int8", **decoder)
    rows = {
        phase: make_row(info, Setting("phases", 1, True), MACHINE, phase, [3.0] * 5) for phase in ("decoder", "group")
    }
    assert {phase: (row.computes, row.backend) for phase, row in rows.items()} == {
        "decoder": (computes, "native-cpu"),
        "group": ("int8", "onnxruntime-cpu"),
    }


def test_whole_images_are_bound_by_the_faster_of_both_precisions() -> None:
    """A bound by the slower peak would be one that a decoder in bf16 beats."""
    limits = Limits(
        ((1, 20.0),), 1.0, "measured once: 2 threads, and multiply fp32 matrices (x)", dots=(("bf16", 8.0),)
    )
    for step, decoder, image in (("fp32", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("bf16", "fp32", "bf16")):
        info = subject_info(computes=step, decoder="native-cpu 0.1.0", decoder_computes=decoder, image_size=(384, 384))
        made = [make_row(info, Setting("phases", 1, True), MACHINE, phase, [3.0] * 5) for phase in ("image", "group")]
        whole, group = with_bounds(made, {info.label: info}, {2: limits})
        assert (whole.matrix_tflop_s, group.matrix_tflop_s) == tuple(
            8.0 if of == "bf16" else 1.0 for of in (image, step)
        )
        assert f"multiply {image} matrices" in whole.limits_from
