"""What this machine allows: bandwidth and matrix peak, the best of several measurements, and when to doubt it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from bench.subjects import subject_info

from par_runtime.backends.native.library import library
from par_runtime.bench import bounds, probes
from par_runtime.bench.bounds import Gauge
from par_runtime.bench.limits import Limits, Round, array_sizes, doubt_of, measure_cpu, of_rounds
from par_runtime.bench.machine import Counters
from par_runtime.errors import RequestError

SMALL, LARGE = 2**24, 2**28
BUSY = "busy: other processes took 40 % of the CPU time"


def a_round(read: float = 20.0, peak: float = 0.4, *flags: str, tool: str = "C kernels") -> Round:
    """A measurement in which ``tool`` was faster than numpy."""
    reads = {LARGE: {"numpy": read * 0.8, tool: read}, SMALL: {"numpy": 3 * read, tool: 2 * read}}
    return Round(reads, {"numpy, openblas": peak / 2, tool: peak}, flags)


# -- what is measured -------------------------------------------------------------------------------------------------


def test_limits_are_measured_here() -> None:
    measured = measure_cpu(1, [2**22])
    tools = {"numpy", "C kernels"} if library() else {"numpy"}
    assert set(measured.reads[2**22]) == tools
    assert all(0.1 < rate < 5000 for rate in measured.reads[2**22].values())  # GB/s of any machine
    assert any(name.startswith("ONNX Runtime") for name in measured.peaks)
    assert any(name.startswith("C kernels") for name in measured.peaks) == (library() is not None)
    assert all(0.0001 < peak < 50 for peak in measured.peaks.values())


def test_a_limit_that_fails_is_one_line() -> None:
    with pytest.raises(
        RequestError, match=r"limits could not be measured \(.+\); --no-limits leaves them out"
    ) as raised:
        measure_cpu(1, [-5])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("ends", "together", "seconds"),
    [
        ([[0, 1, 2, 3]], 1, 1.0),
        ([[0, 5, 6, 7, 20]], 2, 2.0),  # another process had the core for a while, twice
        ([[0, 2, 4, 6], [0, 2, 4, 6]], 2, 2.0),  # two threads, a call each
        ([[0, 1, 2, 3, 9], [0, 6, 7, 8, 9]], 2, 12 / 7),  # 7 calls in 6 s, then 3.5 in 3 s
        ([[0, 1, 2, 3], [1, 3, 5, 7]], 1.5, 1.0),  # only while both work
        ([[0, 1], [0, 1]], 10, 5.0),  # not so many calls were made: at the mean rate
    ],
)
def test_the_time_in_which_all_threads_were_fast(ends: list[list[float]], together: float, seconds: float) -> None:
    assert probes.shortest_window(ends, together) == pytest.approx(seconds)


def test_a_pause_of_one_thread_is_not_counted_as_work() -> None:
    def work(index: int) -> None:
        time.sleep(0.002)

    took = probes.fastest(2, work, 4, 0.05)  # two threads, four calls: two each
    assert took > 0.0035  # a sleep is never shorter


def test_an_error_of_a_thread_is_raised() -> None:
    def work(index: int) -> None:
        raise ArithmeticError(index)

    with pytest.raises(ArithmeticError):
        probes.fastest(2, work, 2, 0.01)


def test_the_model_of_one_product_multiplies() -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(probes.matmul_model(300), providers=["CPUExecutionProvider"])
    a, b = (np.random.default_rng(i).standard_normal((300, 300), np.float32) for i in (1, 2))
    (c,) = session.run(None, {"a": a, "b": b})
    assert np.abs(c - a @ b).max() < 1e-3


@pytest.mark.skipif(library() is None, reason="the C kernels are not built")
def test_the_product_of_the_c_kernels_multiplies() -> None:
    lib = library()
    assert lib is not None
    random = np.random.default_rng(0)
    x = random.standard_normal((5, 70), np.float32)
    w = random.standard_normal((3, 70, lib.parvis_panel()), np.float32)
    product = probes.Product(lib, x)
    product(w.ctypes.data, 3, 2)
    assert np.abs(product.tile - x @ w[2]).max() < 1e-4


@pytest.mark.skipif(library() is None, reason="the C kernels are not built")
def test_the_c_kernels_are_measured_in_each_arithmetic() -> None:
    assert {name: rate > 0 for name, rate in probes.dot_tflop_s(1)} == {"bf16": True, "int8": True}


def test_a_row_is_bound_by_the_arithmetic_that_it_computes_in() -> None:
    rounds = [replace(a_round(20, 0.4), dots={"bf16": 0.7, "int8": 0.9}), replace(a_round(), dots={"bf16": 0.8})]
    limits = of_rounds(rounds, 2)
    assert [limits.peak_tflop_s(name) for name in ("fp32", "bf16", "int8", "fp16")] == [0.4, 0.8, 0.9, 0.4]
    assert limits.how_for("int8").endswith("(C kernels), and multiply int8 matrices (C kernels)")
    assert limits.how_for("fp32") == limits.how
    assert limits.better(replace(limits, dots=(("int8", 1.5),))).peak_tflop_s("int8") == 1.5
    assert replace(limits, dots=(("int8", 0.1),)).peak_tflop_s("int8") == 0.4  # fp32 serves int8 too


# -- the best of several, and when to doubt it ------------------------------------------------------------------------


def test_sizes_hold_each_working_set_and_one_that_no_cache_holds() -> None:
    assert array_sizes([5 * 2**20, 3], 2**25, 2**35) == [2**22, 2**23, 2**28]
    assert array_sizes([2**31], 2**29, None) == [2**30]
    assert array_sizes([2**20], 2**25, 2**28) == [2**22, 2**25]  # an eighth of what is free


def test_the_best_of_all_measurements_and_tools_counts() -> None:
    limits = of_rounds([a_round(20, 0.2, BUSY), a_round(30, 0.3), a_round(25, 0.5, BUSY, tool="ONNX Runtime 1")], 2)
    assert limits.reads == ((SMALL, 90.0), (LARGE, 30.0))
    assert limits.matrix_tflop_s == 0.5
    assert limits.how == (
        "measured 3 times over the run, the best counts: 2 threads read arrays up to 268 MB (C kernels), and multiply "
        "fp32 matrices (ONNX Runtime 1)"
    )
    assert of_rounds([a_round()], 1).how.startswith("measured once: 1 thread read arrays")


@pytest.mark.parametrize(
    ("rounds", "doubt"),
    [
        ([a_round()], ""),
        ([a_round(10, 0.1, BUSY), a_round(20, 0.4), a_round(12, 0.2, BUSY)], ""),  # one was quiet
        ([a_round(20, 0.4), a_round(19, 0.39), a_round(11, 0.2)], ""),  # two of the quiet ones agree
        (
            [a_round(20, 0.4), a_round(15, 0.4)],
            "reading varied from 15 to 20 GB/s, though no other process was seen",
        ),
        (
            [a_round(20, 0.4), a_round(20, 0.2), a_round(20, 0.3)],
            "multiplying varied from 0.2 to 0.4 TFLOP/s, though no other process was seen",
        ),
        (
            [a_round(20, 0.4, BUSY), a_round(20, 0.4, BUSY)],
            "measured while the machine was busy, in all of 2 measurements: other processes took 40 % of the CPU time",
        ),
        (
            [a_round(20, 0.4, "throttled: the CPU lowered its clock 3 times for heat")],
            "measured while the machine was busy, in all of 1 measurements: the CPU lowered its clock 3 times for heat",
        ),
        ([a_round(20, 0.4, "debug: a debug build of Python")], ""),
    ],
)
def test_limits_are_doubted_where_no_measurement_was_quiet_or_quiet_ones_differ(
    rounds: list[Round], doubt: str
) -> None:
    assert doubt_of(rounds) == of_rounds(rounds, 2).doubt == doubt


def test_a_smaller_array_is_read_at_least_as_fast_as_a_larger_one() -> None:
    limits = Limits(((2**22, 10.0), (2**24, 40.0), (2**28, 20.0)), 1.0, "x")
    assert [limits.read_gb_s(size) for size in (1, 2**24, 2**25, 2**30)] == [40.0, 40.0, 20.0, 20.0]


def test_the_better_of_two_measurements() -> None:
    a, b = Limits(((1, 5.0), (9, 2.0)), 1.0, "a"), Limits(((1, 4.0), (9, 3.0)), 2.0, "b")
    assert a.better(b) == Limits(((1, 5.0), (9, 3.0)), 2.0, "a")


# -- over a run -------------------------------------------------------------------------------------------------------


class Machine:
    """A CPU that is busy in the given measurements; counters of a machine at rest, or with a neighbour."""

    def __init__(self, busy: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy, self.measured, self.others_s, self.all_s = list(busy), list[tuple[int, list[int]]](), 0.0, 0.0
        monkeypatch.setattr(bounds, "measure_cpu", self.measure)
        monkeypatch.setattr("par_runtime.bench.machine.counters", self.counters)
        monkeypatch.setattr(bounds, "WAIT_S", 0.0)

    def measure(self, threads: int, sizes: list[int]) -> Round:
        self.measured.append((threads, list(sizes)))
        self.all_s += 10.0
        neighbour = self.busy.pop(0)
        self.others_s += 5.0 if neighbour else 0.0
        return replace(a_round(10 if neighbour else 20, 0.2 if neighbour else 0.4), flags=())

    def counters(self, children: tuple[int, ...] = ()) -> Counters:
        return Counters(self.all_s, self.others_s, 0.0, 0.0, 0, None, None)


def test_a_neighbour_that_goes_does_not_lower_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([True, False], monkeypatch)
    gauge = Gauge({2: [10**7]}, None, lambda _: None)
    gauge.measure()
    assert gauge.limits()[2].doubt.startswith("measured while the machine was busy, in all of 1")
    gauge.after()
    limits = gauge.limits()[2]
    assert (limits.matrix_tflop_s, limits.read_gb_s(10**9), limits.doubt) == (0.4, 20.0, "")
    assert machine.measured[0] == machine.measured[1]  # the same sizes


def test_limits_in_doubt_are_measured_again_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([True, True, True, False], monkeypatch)
    gauge = Gauge({2: [10**7]}, None, lambda _: None)
    gauge.measure()
    gauge.after()
    assert machine.busy == []
    assert gauge.limits()[2].doubt == ""


def test_a_neighbour_that_stays_is_reported_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine([True] * (2 + bounds.MORE_ROUNDS), monkeypatch)
    said: list[str] = []
    gauge = Gauge({2: [10**7]}, None, said.append)
    gauge.measure()
    gauge.after()
    assert gauge.limits()[2].doubt == (
        "measured while the machine was busy, in all of 5 measurements: other processes took 50 % of the CPU time"
    )
    assert said.count("this machine's limits once more: the machine is busy, or was") == bounds.MORE_ROUNDS


def test_between_repetitions_the_limits_take_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([False] * 3, monkeypatch)
    now = [0.0]
    monkeypatch.setattr(bounds.time, "monotonic", lambda: now[0])
    gauge = Gauge({2: [10**7]}, None, lambda _: None)
    gauge.measure()
    gauge.took_s = 2.0
    for now[0] in (1.0, 5.0, 11.0):
        gauge.between()
    assert len(machine.measured) == 1
    now[0] = 12.5
    gauge.between()
    assert len(machine.measured) == 2


def test_no_measurement_of_limits_is_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([True] * 5, monkeypatch)
    now = [0.0]
    monkeypatch.setattr(bounds.time, "monotonic", lambda: now[0])
    gauge = Gauge({2: [10**7]}, None, lambda _: None, until=20.0)
    gauge.measure()
    gauge.took_s = 2.0
    now[0] = 18.5
    gauge.between()
    gauge.after()
    assert len(machine.measured) == 1


def test_each_number_of_threads_has_its_own_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([False] * 2, monkeypatch)
    gauge = Gauge.of([subject_info("a"), subject_info("b", threads=1)], [1, 8], True, None, lambda _: None)
    gauge.measure()
    assert [threads for threads, _ in machine.measured] == [2, 1]
    assert set(gauge.limits()) == {1, 2}
    assert Gauge.of([], [1], True, None, lambda _: None).limits() == {}
