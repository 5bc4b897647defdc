"""Two runs against each other: a change is reported if there is one, and not if there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench.subjects import MACHINE, one_row

from par_runtime.bench.report.compare import compare, slower, text
from par_runtime.bench.rows import Row


def noisy(middle: float, seed: int, count: int = 9) -> list[float]:
    return list(middle * (1 + 0.03 * np.random.default_rng(seed).standard_normal(count)))


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.25, "slower"), (0.8, "faster")])
def test_a_change_is_reported(factor: float, verdict: str) -> None:
    (pair,) = compare([one_row(noisy(100, 1))], [one_row(noisy(100 * factor, 2))]).pairs
    assert pair.verdict == verdict
    assert pair.low <= pair.ratio <= pair.high
    assert pair.ratio == pytest.approx(factor, rel=0.04)


def test_one_sample_proves_nothing_and_is_marked() -> None:
    (pair,) = compare([one_row([100.0])], [one_row([150.0])]).pairs
    assert (pair.low, pair.high, pair.verdict) == (0.0, float("inf"), "too few samples")
    assert pair.change == "too few samples"
    assert "few repetitions" in pair.marks


def test_equal_runs_are_the_same_whatever_the_seed() -> None:
    rows = [one_row(noisy(50, 3)), one_row(noisy(70, 4), phase="group")]
    for seed in range(20):
        assert {pair.verdict for pair in compare(rows, rows, seed).pairs} == {"same"}


def test_a_decoder_in_another_precision_is_another_measurement_where_there_is_decoding() -> None:
    decoding = ("image", "throughput", "first_preview", "serve", "http", "first_image", "start")
    phases = ("group", "load", "copy", *decoding)
    old = [one_row([2.0] * 5, phase=phase) for phase in phases]
    found = compare(old, [replace(row, decoder_computes="bf16") for row in old])
    assert [p.new.phase for p in found.pairs] == ["group", "load", "copy"]
    assert [line.split(",")[-2] for line in found.only_new] == [" decoded in bf16"] * len(decoding)
    assert not any("decoded" in line for line in found.only_old)


def test_rows_are_paired_by_what_they_measure_not_by_place_or_version() -> None:
    old = [one_row([1.0] * 5, phase="group"), one_row([2.0] * 5), one_row([9.0] * 5, label="eager")]
    new = [
        replace(one_row([3.0] * 5), version="2.0", commit="abc"),
        one_row([1.0] * 5, phase="group"),
        one_row([4.0] * 5, n=16),
    ]
    found = compare(old, new)
    assert [(p.new.phase, p.ratio) for p in found.pairs] == [("image", 1.5), ("group", 1.0)]
    assert found.only_old == ("phases eager image, 1 image, L-n4 fp32 n = 4, in fp32 by onnxruntime-cpu, 2 threads",)
    assert found.only_new == ("phases parvis image, 1 image, L-n16 fp32 n = 16, in fp32 by onnxruntime-cpu, 2 threads",)


def test_rows_of_two_precisions_are_no_pair_and_are_told_apart() -> None:
    found = compare([one_row([1.0] * 5)], [one_row([1.0] * 5, precision="fp16")])
    assert found.pairs == ()
    assert ("L-n4 fp32" in found.only_old[0], "L-n4 fp16" in found.only_new[0]) == (True, True)
    found = compare([one_row([1.0] * 5)], [one_row([1.0] * 5, weights="int8")])
    assert found.pairs == ()
    assert "L-n4 int8" in found.only_new[0]


def test_a_pair_of_other_content_or_machine_says_so() -> None:
    old = replace(one_row([1.0] * 5, hash="ffff"), machine=replace(MACHINE, cores=64, gpu="a GPU"))
    found = compare([old], [one_row([1.0] * 5)])
    assert found.pairs[0].marks == ("other machine", "other bundle")
    assert "the old rows are of another machine (a CPU, 64 cores, a GPU): a ratio is of machines" in text(found)


@pytest.mark.parametrize(
    ("factor", "words"), [(1.25, "takes 1.25 times as long"), (0.8, "1.25 times as fast"), (1.0, "same")]
)
def test_a_change_is_worded_in_its_own_direction(factor: float, words: str) -> None:
    (pair,) = compare([one_row([100.0] * 5)], [one_row([100.0 * factor] * 5)]).pairs
    assert pair.change == words


def test_loads_of_the_serve_suite_are_paired_by_place() -> None:
    def load(offered: float, ms: float) -> Row:
        return replace(one_row([ms] * 5, phase="serve"), offered_per_s=offered)

    found = compare([load(1.0, 10.0), load(2.0, 20.0)], [load(1.1, 10.0), load(2.2, 40.0)])
    assert [p.ratio for p in found.pairs] == [1.0, 2.0]


def test_a_pair_has_the_marks_of_both_sides() -> None:
    old = replace(one_row([1.0] * 5), flags=("busy: in 5 of 5, other processes took 40 % of the CPU time",))
    new = replace(
        one_row([1.0] * 5),
        flags=("throttled: x", "debug: a debug build of Python"),
        machine=replace(MACHINE, cpu="another"),
    )
    found = compare([old], [new])
    assert found.pairs[0].marks == ("other machine", "busy", "throttled", "debug")
    assert "other machine, busy, throttled, debug" in text(found)


def test_the_text_names_both_commits() -> None:
    found = compare([replace(one_row([2.0] * 5), commit="aaa")], [replace(one_row([1.0] * 5), commit="bbb")])
    lines = text(found).splitlines()
    assert lines[0] == "old is of commit aaa, new of commit bbb; new/old below 1 is faster"
    assert "0.500" in lines[2]
    assert "2.00 times as fast" in lines[2]
    installed = compare([replace(one_row([2.0] * 5), commit="parvis 0.1.0")], [replace(one_row([1.0] * 5), commit="b")])
    assert text(installed).startswith("old is of parvis 0.1.0, new of commit b; ")
    assert "no row of one file has its pair" in text(compare([one_row([1.0])], [one_row([1.0], n=1)]))


BUSY = ("busy: in 5 of 5, other processes took 40 % of the CPU time",)


@pytest.mark.parametrize("flags", [BUSY, ("throttled: in 1 of 5, the CPU lowered its clock 2 times for heat",)])
@pytest.mark.parametrize("side", ["old", "new", "both"])
def test_a_disturbed_side_carries_no_verdict(flags: tuple[str, ...], side: str) -> None:
    """Identical code came out 9.35 times as fast: samples of one run that agree were disturbed alike."""
    old, new = one_row([935.0] * 5, phase="first_preview"), one_row([100.0] * 5, phase="first_preview")
    old = replace(old, flags=flags) if side != "new" else old
    new = replace(new, flags=flags) if side != "old" else new
    found = compare([old], [new])
    kind = flags[0].split(":")[0]
    assert (found.pairs[0].verdict, found.pairs[0].change) == ("no verdict", f"{kind}: no verdict")
    shown = text(found)
    assert "times as fast" not in shown
    assert f"no verdict on 1 of 1 rows ({kind}); measure both sides again on a quiet machine" in shown
    assert slower(compare([new], [old]), 1.05) == []


@pytest.mark.parametrize(
    ("new", "change"),
    [
        ([80.0, 81.0, 95.5], "few repetitions: no verdict"),
        ([80.0, 81.0, 82.0], "1.23 times as fast"),
        ([120.0, 121.0, 122.0], "takes 1.21 times as long"),
    ],
)
def test_few_repetitions_carry_a_verdict_only_where_they_do_not_overlap(new: list[float], change: str) -> None:
    (pair,) = compare([one_row([95.0, 100.0, 101.0])], [one_row(new)]).pairs
    assert pair.change == change
