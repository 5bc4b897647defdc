"""The matrix products of the C step: each stored dtype in each arithmetic, on each instruction set that this CPU has.

The right value is computed in float64 from the numbers that the arithmetic rounds its operands to.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from instruction_sets import EVERY, EVERY_INT8, OTHERS, X86
from numpy.typing import NDArray

from par_runtime.backends.native.library import described, has_tiles, library, matrix_of
from par_runtime.backends.native.pool import Pool
from par_runtime.bench.probes import Product
from par_runtime.dtypes import ARITHMETICS, Float
from par_runtime.quantised import GROUPS, LEAST_CODE, MOST_CODE, packed

pytestmark = pytest.mark.skipif(library() is None, reason="the C kernels are not built")

FLOATS = ("float32", "float16", "bfloat16")
COLUMNS = 64
#: of sums whose order is not the same, relative to the largest
#: Each arithmetic with each instruction set.
EACH = [(each, name) for each in ARITHMETICS for name in (EVERY_INT8 if each == "int8" else EVERY)]
ROUNDING = 5e-6


def bf16(x: NDArray[Any]) -> Float:
    """``x`` rounded to the nearest bf16, ties to even, in fp32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def stored_bytes(x: Float, dtype: str) -> NDArray[Any]:
    """``x``, which is of ``dtype``, as a weights file has it."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)


@dataclass
class Weights:
    """A matrix [K,N]: as stored, and in float64."""

    dtype: str
    stored: NDArray[Any]
    exact: NDArray[np.float64]
    group: int = 0
    scales: NDArray[Any] | None = None  #: as stored
    scales_dtype: str = "float32"


def weights(dtype: str, k: int, group: int = 0, scales: str = "float16", n: int = COLUMNS) -> Weights:
    random = np.random.default_rng(k)
    if dtype in FLOATS:
        x = 0.1 * random.standard_normal((k, n), np.float32)
        x = bf16(x) if dtype == "bfloat16" else x.astype(dtype).astype(np.float32)
        return Weights(dtype, stored_bytes(x, dtype), x.astype(np.float64))
    codes = random.integers(LEAST_CODE[dtype], MOST_CODE[dtype] + 1, (k, n)).astype(np.int8)
    each = bf16(random.uniform(0.001, 0.01, (k // group, n)))
    each = each.astype(np.float16).astype(np.float32) if scales == "float16" else each
    exact = codes * np.repeat(each.astype(np.float64), group, axis=0)
    code_bytes = np.frombuffer(packed(codes, dtype), np.uint8)
    return Weights(dtype, code_bytes, exact, group, stored_bytes(each, scales), scales)


def multiplied(x: Float, w: Weights, arithmetic: str, halves: bool = False) -> Float:
    """x [M,K] times ``w`` by the C kernels, [M,N]; the columns of w13, with ``halves``, in the order of its panels."""
    lib = library()
    assert lib is not None
    (k, n), panel = w.exact.shape, lib.parvis_panel()
    matrix = matrix_of(lib, w.dtype, arithmetic, w.group, w.scales_dtype)
    size = lib.parvis_matrix_bytes(ctypes.byref(matrix), k, n)
    panels = np.zeros(size + 1, np.uint8)
    panels[-1] = 77
    scales = None if w.scales is None else w.scales.ctypes.data
    pool = Pool(lib, "parvis_", 3)
    given = (ctypes.byref(matrix), w.stored.ctypes.data, scales, k, n, int(halves))
    assert lib.parvis_pack_matrix(pool.handle, *given, panels.ctypes.data) == 0
    pool.close()
    assert panels[-1] == 77
    product = Product(lib, np.ascontiguousarray(x), matrix)
    results = []
    for i in range(n // panel):
        product(panels.ctypes.data + i * (size // (n // panel)), 1, 1)
        results.append(product.tile.copy())
    return np.concatenate(results, axis=1)


def rounded(x: Float, arithmetic: str, group: int) -> NDArray[np.float64]:
    """``x`` [M,K] as the arithmetic rounds it."""
    if arithmetic == "fp32":
        return x.astype(np.float64)
    if arithmetic == "bf16" or not group:
        return bf16(x).astype(np.float64)
    blocks = x.reshape(len(x), -1, group)
    largest = np.abs(blocks).max(2, keepdims=True)
    codes = np.rint(blocks.astype(np.float64) * (np.float32(127) / largest))
    return (codes * (largest / np.float32(127)).astype(np.float64)).reshape(x.shape)


def expected(x: Float, w: Weights, arithmetic: str) -> NDArray[np.float64]:
    exact = w.exact
    if arithmetic != "fp32" and not w.group:
        exact = bf16(exact).astype(np.float64)
    return rounded(x, arithmetic, w.group) @ exact


def far(result: Float, right: NDArray[np.float64]) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(result - right).max() / np.abs(right).max())


def cases() -> list[tuple[str, int]]:
    return [(dtype, 0) for dtype in FLOATS] + list(itertools.product(MOST_CODE, GROUPS))


@pytest.mark.parametrize(("arithmetic", "instructions"), EACH)
def test_products_are_those_of_the_rounded_operands(
    arithmetic: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    for dtype, group in cases():
        for k in (384, 2816, 3200):
            w = weights(dtype, k, group)
            x = np.random.default_rng(1).standard_normal((40, k), np.float32)
            right = expected(x, w, arithmetic)
            for m in range(1, 41) if k == 384 else (2, 13, 32):
                result = multiplied(x[:m], w, arithmetic)
                assert far(result, right[:m]) < ROUNDING, (dtype, group, k, m)


@pytest.mark.parametrize(("arithmetic", "instructions"), EACH)
@pytest.mark.parametrize("scales", FLOATS)
def test_scales_of_each_dtype_and_both_halves_of_w13(
    scales: str, arithmetic: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    x = np.random.default_rng(2).standard_normal((5, 128), np.float32)
    in_panels = np.arange(COLUMNS).reshape(2, 2, 16).transpose(1, 0, 2).reshape(-1)
    for dtype, group in cases():
        w = weights(dtype, 128, group, scales)
        right = expected(x, w, arithmetic)[:, in_panels]
        assert far(multiplied(x, w, arithmetic, halves=True), right) < ROUNDING, (dtype, group)


@pytest.mark.parametrize(("arithmetic", "instructions"), EACH)
def test_a_row_does_not_depend_on_the_others_and_not_on_their_number(
    arithmetic: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, so that an image does not depend on the batch that it is made in."""
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    for (dtype, group), k in itertools.product(cases(), (256, 672)):
        if k % max(group, 32):
            continue
        x = np.random.default_rng(3).standard_normal((33, k), np.float32)
        w = weights(dtype, k, group)
        every = multiplied(x, w, arithmetic)
        for few in (1, 2, 3, 5, 8, 13):
            assert np.array_equal(every[20 : 20 + few], multiplied(x[20 : 20 + few], w, arithmetic)), (
                dtype,
                group,
                few,
            )


@pytest.mark.parametrize("instructions", EVERY_INT8[1:])
def test_in_int8_all_sets_have_the_same_bits(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's sum is a whole number, and what follows is done in one order. So tiles may take many rows alone."""
    for dtype, group in itertools.product(MOST_CODE, GROUPS):
        x = np.random.default_rng(6).standard_normal((40, 384), np.float32)
        w = weights(dtype, 384, group)
        for m in (1, 15, 16, 17, 40):
            monkeypatch.setenv("PARVIS_NATIVE", "")
            ours = multiplied(x[:m], w, "int8")
            monkeypatch.setenv("PARVIS_NATIVE", instructions)
            assert np.array_equal(multiplied(x[:m], w, "int8"), ours), (dtype, group, m)


@pytest.mark.parametrize(("arithmetic", "instructions"), EACH)
def test_hostile_activations(arithmetic: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of zeros, of huge and of tiny numbers, with one outlier, with a NaN, with an infinity."""
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    normal = np.random.default_rng(4).standard_normal(256).astype(np.float32)
    x = np.stack([0 * normal, 1e30 * normal, 1e-25 * normal, 1e-41 * normal, normal, normal, normal]).astype(np.float32)
    x[4, 7], x[5, 9], x[6, 11] = 1e4, np.nan, np.inf
    for dtype, group in cases():
        w = weights(dtype, 256, group)
        result = multiplied(x, w, arithmetic)
        right = expected(x[[0, 1, 2, 4]], w, "fp32")
        assert np.all(result[0] == 0)
        assert np.abs(result[3]).max() < 1e-38
        for row, of in ((1, 1), (2, 2), (4, 3)):
            largest = np.abs(x[row]).max() * np.abs(w.exact).max()
            assert np.abs(result[row] - right[of]).max() / largest < (1e-4 if arithmetic == "fp32" else 0.2)
        assert np.isnan(result[5]).all()
        assert not np.isfinite(result[6]).any()


@pytest.mark.parametrize(("arithmetic", "instructions"), EACH)
def test_the_largest_codes_and_activations_fit(
    arithmetic: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one sign, so that sums of 16 bits, where an instruction set has them, are as large as they can be."""
    monkeypatch.setenv("PARVIS_NATIVE", instructions)
    x = np.ones((7, 256), np.float32)
    x[1::2] *= -1
    for dtype, group in cases():
        for code in (LEAST_CODE[dtype], MOST_CODE[dtype]) if group else ():
            codes = np.full((256, COLUMNS), code, np.int8)
            stored = np.frombuffer(packed(codes, dtype), np.uint8)
            ones = np.ones((256 // group, COLUMNS), np.float32)
            result = multiplied(x, Weights(dtype, stored, codes.astype(np.float64), group, ones), arithmetic)
            assert far(result, x.astype(np.float64) @ codes) < ROUNDING, (dtype, group, code)


@pytest.mark.skipif(not X86, reason="the names are those of x86-64")
def test_the_sets_of_this_cpu_differ_in_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would test one set only. A CPU with fewer instructions has fewer of them."""
    lib = library()
    assert lib is not None
    # A system may refuse AMX to a process, so that a CPU that has it may have no tiles.
    assert not has_tiles(lib) or {"amx_tile", "amx_bf16", "amx_int8"} <= cpu_flags()

    def layouts(instructions: str) -> tuple[int, list[int]]:
        monkeypatch.setenv("PARVIS_NATIVE", instructions)
        return lib.parvis_extra_instructions(), [matrix_of(lib, "int8", each, 32).layout for each in ARITHMETICS]

    none, plain = layouts("avx2")
    assert (none, layouts("avx512")) == (0, (0, plain))
    for instructions in ("", "dots", "vnni"):
        extra, taken = layouts(instructions)
        assert [taken[i] != plain[i] for i in range(3)] == [False, bool(extra & 1), bool(extra & 2)]
    assert not layouts("vnni")[0] & 1
    if {"avx512_bf16", "avx512vbmi", "avx512_vnni"} <= cpu_flags():
        assert layouts("")[0] & 3 == 3
    assert (layouts("sse")[1][2] != plain[2]) == ("sse" in OTHERS)


@pytest.mark.parametrize(
    ("instructions", "extra", "text"),
    [
        ("avx2", 0, "avx2"),
        ("avx512", 3, "avx512 with dot products in bf16 and int8"),
        ("avx512", 7, "avx512 with AMX and dot products in bf16 and int8"),
        ("neon", 2, "neon with dot products in int8"),
        ("neon", 10, "neon with matrix products in int8"),
    ],
)
def test_what_the_doctor_calls_them(instructions: str, extra: int, text: str) -> None:
    class Library:
        def parvis_instructions(self) -> bytes:
            return instructions.encode()

        def parvis_extra_instructions(self) -> int:
            return extra

    assert described(Library()) == text  # type: ignore[arg-type]


def cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as opened:
            return set(next(line for line in opened if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


@pytest.mark.parametrize(
    ("arithmetic", "group", "plain", "with_outliers"),
    [("bf16", 64, 0.002, 0.002), ("int8", 32, 0.006, 0.012), ("int8", 64, 0.006, 0.017), ("int8", 128, 0.007, 0.024)],
)
def test_what_rounding_activations_costs(arithmetic: str, group: int, plain: float, with_outliers: float) -> None:
    """The figures of docs/design.md: the root of the mean square of the error, relative to that of the result.

    Outliers are columns 30 times as large as the others, one in 200, as attention sinks make them.
    """
    w = weights("int8", 1024, group)
    for outliers, at_most in ((1, plain), (30, with_outliers)):
        x = np.random.default_rng(5).standard_normal((16, 1024), np.float32)
        x[:, ::200] *= outliers
        right = x.astype(np.float64) @ w.exact
        error = np.sqrt(np.square(multiplied(x, w, arithmetic) - right).mean() / np.square(right).mean())
        assert 0.7 * at_most < error < at_most
