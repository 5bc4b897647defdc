"""What this machine allows: bandwidth at several array sizes and the matrix peak, both measured."""

from __future__ import annotations

import pytest

from par_runtime.bench.limits import Limits, array_sizes, matrix_tflop_s, measure_cpu, read_gb_s
from par_runtime.errors import RequestError


def test_limits_are_measured_here() -> None:
    measured = measure_cpu(1, [2**22])
    assert 0.1 < measured.reads[0][1] < 2000  # GB/s of any machine
    assert 0.0005 < measured.matrix_tflop_s < 50
    assert "1 thread read arrays up to 4 MB" in measured.how
    # Each thread has a part of its own: two together read the whole array, and multiply twice as much.
    assert read_gb_s(2, 2**22) > 0
    assert matrix_tflop_s(2, 64) > 0


def test_a_limit_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RequestError, match=r"limits could not be measured \(.+\); --no-limits leaves them out"
    ) as raised:
        measure_cpu(1, [-5])
    assert "\n" not in str(raised.value)


def test_sizes_hold_each_working_set_and_one_that_no_cache_holds() -> None:
    assert array_sizes([5 * 2**20, 3], 2**25, 2**35) == [2**22, 2**23, 2**28]
    assert array_sizes([2**31], 2**29, None) == [2**30]
    assert array_sizes([2**20], 2**25, 2**28) == [2**22, 2**25]  # an eighth of what is free


def test_the_better_of_two_measurements() -> None:
    a, b = Limits(((1, 5.0), (9, 2.0)), 1.0, "a"), Limits(((1, 4.0), (9, 3.0)), 2.0, "b")
    assert a.better(b) == Limits(((1, 5.0), (9, 3.0)), 2.0, "a")
    assert [a.read_gb_s(size) for size in (1, 2, 9, 100)] == [5.0, 2.0, 2.0, 2.0]
