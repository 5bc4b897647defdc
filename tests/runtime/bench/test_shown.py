"""What people see: the table, the sentence that says which limit it is; test_page.py has the page."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from bench.pages import shown_page
from bench.subjects import HOW, MACHINE, Scripted, against, one_row, rows_from, subject_info

from par_runtime.bench.bounds import bound_flags
from par_runtime.bench.limits import Limits
from par_runtime.bench.report import paper as paper_report
from par_runtime.bench.report import text, words
from par_runtime.bench.report.advice import advice, part_of
from par_runtime.bench.report.plot import ticks
from par_runtime.bench.report.words import number, percent, speed
from par_runtime.bench.rows import Row
from par_runtime.cost.data_sheets import predictions


@pytest.mark.parametrize(
    ("rows", "kind", "lever"),
    [
        (against(20, 10, 80), "bandwidth-bound", "a larger n than 4"),
        (against(20, 10, 80, n=16), "bandwidth-bound", "Every call reads all weights: a larger batch"),
        (against(1000, 0.1, 60), "compute-bound", "images without guidance need half of it"),
        (against(1000, 10, 80), "launch-bound", "neither reading weights nor multiplying explains the time"),
    ],
)
def test_it_says_which_limit_it_is_and_what_would_help(rows: list[Row], kind: str, lever: str) -> None:
    found = advice(rows)
    assert found is not None
    assert found.kind == kind
    assert {"launch-bound": "bound by the cost of each call"}.get(kind, kind) in found.text  # of a CPU
    assert lever in found.text


#: A call of PAR-L at n = 4 reads 1.4 GB on average and does 5.5 GFLOP: at 20 GB/s and 0.1 TFLOP/s 71 and 55 ms.
UNSURE = "measured while the machine was busy, in all of 2 measurements: other processes took 40 % of the CPU time"


@pytest.mark.parametrize(
    ("rows", "kind", "sentence"),
    [
        (against(20, 0.1, 80), "bandwidth-bound", "at 88 % of the bound as measured: bandwidth-bound"),
        (against(20, 0.1, 80, UNSURE), "near both limits", "The limits are in doubt, so either may be the nearer one."),
        (
            against(20, 0.079, 80),
            "near both limits",
            "call needs at least 70.8 ms for reading and 68.8 ms for multiplying. F",
        ),
        (against(20, 0.04, 160, UNSURE), "compute-bound", "compute-bound"),  # twice as long as reading
        # Measured beside a neighbour that left half of the arithmetic: without it, the row is bandwidth-bound.
        (against(20, 0.045, 94, UNSURE), "unknown", "at 127 % of the bound as measured: above it"),
        (against(10, 10, 80), "unknown", "no limit is named; run it again on a quiet machine"),
    ],
)
def test_no_limit_is_named_that_the_measurements_do_not_carry(rows: list[Row], kind: str, sentence: str) -> None:
    found = advice(rows)
    assert found is not None
    assert found.kind == kind
    assert sentence in found.text
    assert "compute-bound" not in found.text or kind == "compute-bound"


@pytest.mark.parametrize(
    ("doubt", "percent", "marks", "why"),
    [
        ("", 100.4, [], ""),
        ("", 131.0, ["above bound"], "the limit was measured too low"),
        (UNSURE, 80.0, ["limits in doubt"], ""),
        (UNSURE, 131.0, ["limits in doubt", "above bound"], "the limit was measured while the machine was busy"),
    ],
)
def test_a_bound_that_cannot_be_trusted_is_marked(doubt: str, percent: float, marks: list[str], why: str) -> None:
    flags = bound_flags(percent, Limits(((1, 1.0),), 1.0, HOW, doubt))
    assert [flag.split(":")[0] for flag in flags] == marks
    assert not why or flags[-1] == f"above bound: above the bound as measured: {why}, so the row names no limit"


def test_an_image_that_is_mostly_decoding_says_so() -> None:
    rows = against(20, 10, 80)
    image = rows[-1]
    decoder = replace(image, phase="decoder", median_ms=20_000.0, samples_ms=(20_000.0,) * 5)
    found = advice([*rows[:-1], decoder, replace(image, median_ms=32_000.0, samples_ms=(32_000.0,) * 5)])
    assert found is not None
    assert found.kind == "decoder-bound"
    assert "62 % of an image's time is its decoding" in found.text
    assert found.text.endswith("take a smaller decoder.")


@pytest.mark.parametrize(
    ("could", "version", "backend", "computes", "decoding_ms", "takes"),
    [
        ("amx", "0.1.0 (avx512, amx, bf16)", "native-cpu", "fp32", 2_000.0, "AMX for it too"),
        ("amx", "0.1.0 (avx512)", "native-cpu", "fp32", 2_000.0, "AMX for it"),
        ("dots", "0.1.0 (avx512, int8)", "native-cpu", "fp32", 2_000.0, "dot products for it"),
        ("amx", "0.1.0 (avx512, amx, bf16)", "native-cpu", "fp32", 500.0, ""),
        ("", "0.1.0 (avx512, amx, bf16)", "native-cpu", "bf16", 2_000.0, ""),
        ("", "0.1.0 (avx512, amx, bf16)", "onnxruntime-cpu", "fp32", 2_000.0, ""),
        ("", "0.1.0 (avx512)", "native-cpu", "fp32", 2_000.0, ""),  # PARVIS_NATIVE forbids it, or the CPU is Intel's
    ],
)
def test_a_decoder_that_could_take_fewer_bits_is_named(
    could: str, version: str, backend: str, computes: str, decoding_ms: float, takes: str
) -> None:
    rows = [replace(row, decoder_bf16=could) for row in against(20, 10, 80)]
    image = replace(rows[-1], version=version, median_ms=12_000.0, samples_ms=(12_000.0,) * 5)
    times = {"median_ms": decoding_ms, "samples_ms": (decoding_ms,) * 5}
    decoder = replace(image, phase="decoder", backend=backend, computes=computes, **times)  # type: ignore[arg-type]
    found = advice([*rows[:-1], decoder, image])
    assert found is not None
    sentence = f". Decoding, 17 % of an image's time, is in fp32: --decoder-precision bf16 takes {takes}, and "
    assert (sentence in found.text) == bool(takes)
    assert (" is in fp32: " in found.text) == bool(takes)


def test_a_host_that_is_slow_says_so() -> None:
    rows = against(20, 10, 80)
    slow = [replace(row, median_ms=9_000.0) if row.phase == "copy" else row for row in rows]
    found = advice(slow)
    assert found is not None
    assert "passes between calls, on the host" in found.text


def test_without_limits_nothing_is_claimed() -> None:
    assert advice(rows_from(Scripted(subject_info()))) is None
    assert advice([]) is None


def test_the_table_says_what_was_measured_on_what() -> None:
    rows = [*against(20, 10, 80), *against(20, 10, 240, label="eager", backend="torch eager", pytorch=True)]
    shown = text.table(rows)
    assert "machine   a CPU, 2 cores, 16 GB, an OS" in shown
    assert (
        "parvis    L-n4 (01234567): PAR-L, 342.9 M parameters, n = 4, fp32 computed in fp32 by onnxruntime-cpu "
        "1.32.0, 2 threads" in shown
    )
    assert "limits    20 GB/s, 10 TFLOP/s (measured: by hand)" in shown
    assert "parvis is 3.00 times as fast as eager" in shown
    assert re.search(r"^parvis +group +1 +142 +11\.4 s +0 ms +80 ms", shown, re.MULTILINE)
    assert "bandwidth-bound" in shown


@pytest.mark.parametrize(
    ("ours_ms", "its_ms", "words"),
    [
        (100.0, 300.0, "is 3.00 times as fast as"),
        (100.0, 55.0, "takes 1.82 times as long as"),
        (100.0, 100.2, "is as fast as"),
        (100.2, 100.0, "is as fast as"),
    ],
)
def test_a_ratio_is_never_below_one(ours_ms: float, its_ms: float, words: str) -> None:
    assert speed(ours_ms, its_ms) == words
    rows = [one_row([ours_ms] * 5), one_row([its_ms] * 5, label="eager", pytorch=True, backend="torch eager")]
    assert text.ratios(rows)[0].startswith(f"parvis {words} eager (")


@pytest.mark.parametrize(("value", "shown"), [(2.961, "2.96 x"), (0.55, "1.82 x slower"), (1.0, "1.00 x"), (None, "")])
def test_a_ratio_in_a_table_is_never_below_one(value: float | None, shown: str) -> None:
    assert paper_report.times(value) == shown


def test_bundles_are_compared_with_n1_of_their_own_precision() -> None:
    rows = [
        one_row(
            [1000.0 * n1 + 100 * (4 if n1 else 1)] * 5, label=f"{p}{' n1' if n1 else ''}", n=1 if n1 else 4, precision=p
        )
        for n1 in (False, True)
        for p in ("fp32", "fp16")
    ]
    assert text.ratios(rows) == [
        "fp32 is 14.00 times as fast as fp32 n1 (100 ms against 1400 ms)",
        "fp16 is 14.00 times as fast as fp16 n1 (100 ms against 1400 ms)",
    ]
    out = shown_page(rows)
    assert out.count("PAR-L fp32, n = 4: fp32 is 14.00 times as fast as fp32 n1") == 1
    assert out.count("PAR-L fp16, n = 4: fp16 is 14.00 times as fast as fp16 n1") == 1


def test_quantised_weights_are_another_kind_and_are_named() -> None:
    """A model in int8 at n = 1 says nothing of what n gains for one in fp16."""
    n4 = one_row([100.0] * 5, label="fp16", precision="fp16", computes="bf16")
    n1 = one_row([150.0] * 5, label="int8 n1", n=1, precision="fp16", weights="int8", computes="bf16")
    assert text.ratios([n4, n1]) == ["fp16 is 1.50 times as fast as int8 n1 (100 ms against 150 ms)"]
    assert "Speed-up by parallel decoding" not in shown_page([n4, n1])
    same = one_row([100.0] * 5, label="int8", precision="fp16", weights="int8", computes="bf16")
    assert "PAR-L, n = 4: int8 is 1.50 times as fast as int8 n1" in shown_page([same, n1])
    shown = text.table([n4, n1])
    assert "n = 4, fp16 computed in bf16 by" in shown
    assert "n = 1, int8 computed in bf16 by" in shown


def test_parts_of_an_image_are_of_the_same_repetition() -> None:
    """Medians of parts can add up to more than the median of the whole."""
    image = one_row([10.0, 10.0, 10.0])
    steps = [one_row([9.0, 1.0, 9.0], phase="group"), one_row([1.0, 9.0, 0.5], phase="transition")]
    assert part_of(steps, image) == pytest.approx(1.0)
    assert part_of([one_row([5.0], phase="group")], image) == pytest.approx(0.5)


def test_a_ratio_that_the_samples_do_not_show_says_so() -> None:
    noisy = one_row([60.0, 90.0, 100.0, 140.0, 200.0])
    eager = one_row([70.0, 95.0, 104.0, 120.0, 190.0], label="eager", pytorch=True, backend="torch eager")
    (line,) = text.ratios([noisy, eager])
    assert line == ("parvis is 1.04 times as fast as eager (100 ms against 104 ms; the samples do not tell them apart)")


@pytest.mark.parametrize("mark", ["busy: in 5 of 5, other processes took 80 % of the CPU time", "throttled: once"])
def test_an_image_that_is_estimated_on_a_disturbed_machine_has_no_ratio(mark: str) -> None:
    ours = one_row([100.0] * 5)
    eager = one_row([7800.0] * 5, label="eager", pytorch=True, backend="torch eager")
    estimated = "estimated: from 8 calls"
    assert text.ratios([ours, replace(eager, flags=(mark,))])[0].startswith("parvis is 78.00 times as fast as eager")
    assert text.ratios([ours, replace(eager, flags=(estimated,))])[0].startswith("parvis is 78.00 times")
    (line,) = text.ratios([ours, replace(eager, flags=(estimated, mark))])
    assert line == (
        f"no ratio of parvis and eager: the image of eager is estimated from samples that are marked "
        f"{mark.split(':')[0]}; measure again on a quiet machine"
    )


def test_subjects_whose_calls_read_from_different_caches_have_their_own_bandwidth() -> None:
    rows = [*against(20, 10, 80), *against(20, 10, 90, label="b"), *against(30, 10, 80, label="c")]
    assert "limits    20 GB/s (parvis, b), 30 GB/s (c), 10 TFLOP/s (measured: by hand)" in text.about(rows)


def test_the_worst_of_several_disturbances_is_said() -> None:
    flags = [f"busy: in 1 of 1, other processes took {share} % of the CPU time" for share in (9, 70, 30)]
    loads = [replace(one_row([1.0] * 5, phase="serve"), flags=(flag,)) for flag in flags]
    assert text.doubts(loads) == ["parvis: busy: in 1 of 1, other processes took 70 % of the CPU time"]


@pytest.mark.parametrize(
    ("value", "shown"), [(1580.0, "1580"), (41.27, "41.3"), (0.00123, "0.00123"), (2e-5, "<0.001"), (0.0, "0")]
)
def test_numbers_have_no_exponent(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(131.4, "above (131 %)"), (100.4, "100 %"), (62.3, "62 %"), (0.3, "<1 %"), (0.0, "0 %"), (None, "")],
)
def test_shares_of_the_bound(value: float | None, shown: str) -> None:
    assert percent(value) == shown


def test_a_doubt_names_its_phases_where_not_all_have_it() -> None:
    rows = [one_row([1.0] * 5, phase="group"), replace(one_row([1.0] * 5), flags=("busy: x",))]
    assert text.doubts(rows) == ["parvis (image): busy: x"]
    assert text.doubts(rows[1:]) == ["parvis: busy: x"]
    assert text.doubts([*rows[1:], replace(rows[1], label="b")]) == ["parvis, b: busy: x"]


@pytest.mark.parametrize(
    ("mhz", "memory_mhz", "clocks"),
    [(1410.0, 1593.0, ", 1410 MHz, memory 1593 MHz"), (1410.0, None, ", 1410 MHz"), (None, None, "")],
)
def test_the_gpu_is_named_with_the_clocks_that_are_known(
    mhz: float | None, memory_mhz: float | None, clocks: str
) -> None:
    gpu = replace(MACHINE, gpu="a GPU", gpu_driver="a driver", gpu_mhz=mhz, gpu_memory_mhz=memory_mhz)
    assert f"gpu       a GPU, a driver{clocks}" in text.about([replace(one_row([1.0]), machine=gpu)])


def test_marks_stand_in_the_row_and_are_explained_once() -> None:
    rows = [
        replace(row, flags=("busy: in 5 of 5, other processes took 40 % of the CPU time",))
        for row in against(20, 10, 80)
    ]
    shown = text.table(rows)
    assert shown.count("other processes took 40 %") == 1
    assert re.search(r"^parvis +image .* busy$", shown, re.MULTILINE)


def test_predictions_say_that_they_are() -> None:
    shown = text.predicted_table(predictions(subject_info().architecture, "L-n4", 4, 1, True))
    assert shown.startswith(
        "By data sheet, weights as they are stored, without decoding: no GPU was here, nothing of this was measured."
    )
    assert shown.count("not measured") == 6
    assert re.search(r"A100-80 .* 5[01]\.\d ms", shown)


def test_ticks_are_round() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 0.7) == [0, 0.2, 0.4, 0.6]
    assert ticks(0, 4200) == [0, 1000, 2000, 3000, 4000]


def test_two_bandwidths_of_one_subject_say_what_they_belong_to() -> None:
    def row(images: int, read: float, label: str = "parvis") -> Row:
        return replace(one_row([9.0] * 5, label, "throughput"), images=images, read_gb_s=read, matrix_tflop_s=0.5)

    (line,) = (line for line in text.about([row(1, 124.0), row(2, 124.0), row(4, 79.1)]) if line.startswith("limits"))
    assert "124 GB/s (parvis 1 image, parvis 2 images), 79.1 GB/s (parvis 4 images), 0.5 TFLOP/s" in line
    (line,) = (line for line in text.about([row(1, 124.0), row(1, 79.1, "b")]) if line.startswith("limits"))
    assert "124 GB/s (parvis), 79.1 GB/s (b), 0.5 TFLOP/s" in line


@pytest.mark.parametrize(
    ("threads", "device", "flags", "said"),
    [
        (2, "cpu", ("busy: x",), True),
        (1, "cpu", ("busy: x",), False),
        (2, "cpu", (), False),
        (None, "cuda", ("busy: x",), False),
    ],
)
def test_busy_rows_of_several_threads_are_advised_to_take_fewer(
    threads: int | None, device: str, flags: tuple[str, ...], said: bool
) -> None:
    rows = [replace(row, threads=threads, device=device, flags=flags) for row in against(20, 10, 80)]
    found = advice(rows)
    assert found is not None
    assert ("fewer threads than the free cores (--threads 1) may be faster then" in found.text) is said


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (words.ms(1_600_000.0), "1600 s"),
        (words.ms(999.7), "1000 ms"),
        (words.ms(9999.7), "10000 ms"),
        (words.ms(12_345.0), "12.3 s"),
        (words.number(999.6), "1000"),
        (words.number(99.96), "100"),
        (words.size(1.6e12), "1600 GB"),
        (words.size(999.9e6), "1000 MB"),
    ],
)
def test_no_number_is_shown_with_an_exponent(shown: str, wanted: str) -> None:
    assert shown == wanted
