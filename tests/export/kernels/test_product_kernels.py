"""The products of a step in the interpreter against numpy in float64: shapes, precisions, ragged tails, idle rows.

Memory that nobody wrote is NaN, and so is everything behind the sizes: whatever leaks shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from kernel_arrays import KIND, ROUNDING, empty, launch, stored, wide
from test_pack_kernels import packed, packed_codes, packed_scales

from par_export.kernels.step_weights import BITS
from par_export.kernels.tile_shapes import ProductTile
from par_export.quantised import nearest

GAIN = 3  # exponent of the power of two of the gains
SIZES = [
    # d, H, D, D', F, V
    (16, 2, 8, 8, 48, 40),
    (40, 2, 20, 24, 256, 64),
    (64, 1, 64, 64, 96, 130),
]


class Tile(NamedTuple):
    """Columns and rows of a panel, rows of a block; of a block of many rows, panels side by side and rows in a turn."""

    bn: int
    bk: int
    bm: int
    panels: int = 0
    deep: int = 0


TILES = [Tile(32, 32, 8), Tile(16, 64, 16), Tile(64, 32, 32)]  # two parts, four, one
#: Blocks of many rows, of whole numbers of panels, with a size, rows and queries: two parts in a turn each, four in two
#: turns, one in two; two blocks of rows, one, and one of which most rows are none.
MANY = [
    (Tile(32, 32, 32, 2, 16), (64, 2, 20, 24, 96, 120), 6, 9, None),
    (Tile(16, 128, 64, 4, 16), (64, 1, 64, 64, 160, 120), 4, 11, None),
    (Tile(64, 32, 64, 1, 16), (40, 2, 20, 24, 256, 64), 3, 4, None),
    # Of codes: groups of a piece, of half of one, and of two.
    (Tile(32, 64, 32, 2, 32), (64, 2, 32, 32, 96, 120), 5, 9, ("int8", 32)),
    (Tile(32, 128, 64, 4, 128), (128, 2, 64, 64, 192, 120), 4, 4, ("int4", 64)),
    (Tile(64, 128, 32, 1, 128), (128, 2, 64, 64, 384, 120), 4, 4, ("int4", 128)),
]

#: dtype, group, d and F, a tile: a piece in a block of K, several pieces; groups of one
#: piece, of several, of half a piece; K that no block divides.
CODES = [
    ("int8", 32, 64, 96, 32, 32, 8),
    ("int8", 64, 192, 256, 64, 128, 16),
    ("int8", 128, 128, 128, 32, 128, 8),
    ("int4", 32, 96, 416, 64, 128, 32),
    ("int4", 64, 256, 256, 32, 256, 8),
    ("int4", 128, 128, 384, 32, 128, 16),
]


@dataclass
class Packed:
    """A matrix as kernels read it: arguments, constants, tiles of columns, and in float64 what it stands for."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    tiles: int
    wide: np.ndarray

    def blocks(self, tile: Tile) -> int:
        """Blocks of columns."""
        return self.tiles // max(1, tile.panels)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def parts_of(bn: int, bk: int) -> int:
    """Into how many parts a product of numbers cuts its panels' rows."""
    return ProductTile(bn, bk, 1, 4, 2, 0).parts


class Case:
    """Random x with its h and sums of squares, as an earlier kernel leaves them, for ``m`` rows of width ``d``."""

    def __init__(self, m: int, d: int, tiles: int, bm: int, precision: str, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.precision, self.m, self.d = precision, m, d
        self.stride, self.power = round_up(d, 64), round_up(d, 4)
        rows = round_up(m, bm)
        self.x = np.full((rows, self.stride), np.nan, np.float32)
        self.x[:m, :d] = self.rng.normal(size=(m, d)) * 3
        gains = self.rng.uniform(0.1, 1, d)
        self.gains = np.full(self.power + 4, np.nan, np.float32)
        self.gains[:d], self.gains[self.power] = gains, 2.0**GAIN
        self.h = empty((rows, self.stride), precision)
        self.h[:m, :d] = stored(self.x[:m, :d] * self.gains[:d], precision)
        self.ss = np.full((rows, tiles), np.nan, np.float32)
        parts = np.array_split(np.square(self.x[:m, :d].astype(np.float64)), tiles, axis=1)
        self.ss[:m] = np.stack([part.sum(1) for part in parts], 1)

    def normed(self) -> np.ndarray:
        """What the product should see: [m, d]."""
        square = np.square(self.x[: self.m, : self.d].astype(np.float64)).mean(1, keepdims=True)
        return wide(self.h)[: self.m, : self.d] * 2.0**GAIN / np.sqrt(square + 1e-5)

    def matrix(self, k: int, n: int) -> np.ndarray:
        return (self.rng.normal(size=(k, n)) / np.sqrt(k)).astype(np.float32)

    def pack(self, raw: np.ndarray, codes: tuple[str, int] | None = None, **constants: Any) -> Packed:
        """``raw`` [K,N] in panels; with ``codes`` rounded to a dtype with groups."""
        if codes is None:
            held = stored(raw, self.precision)
            part = constants["BK"] // parts_of(constants["BN"], constants["BK"])
            panels = packed(held, (self.precision, self.precision), **constants, PART=part)
            nothing = {"BITS": 0, "GROUP": 0, "SUB": 0, "scales": 0}
            return Packed({"weights": (self.kind, panels)}, nothing, panels.shape[0], wide(held))
        dtype, group = codes
        scales = "bf16" if self.precision == "bf16" else "fp16"
        matrix = nearest(raw, dtype, group, {"bf16": "bfloat16", "fp16": "float16"}[scales])
        tile = ProductTile(constants["BN"], constants.pop("BK"), 1, 4, 2, 0, BITS[dtype], group)
        panels = packed_codes(matrix, tile, **constants)
        of_codes = {"BITS": tile.bits, "GROUP": group, "SUB": tile.sub, "PARTS": tile.parts}
        arguments = {
            "weights": ("*u8", panels),
            "scales": (KIND[scales], packed_scales(matrix, stored(matrix.scales, scales), tile, **constants)),
        }
        return Packed(arguments, of_codes, panels.shape[0], matrix.dequantised().astype(np.float64))

    def sizes(self, tiles: int, tile: Tile) -> dict[str, Any]:
        return {
            "D_MODEL": self.d, "STRIDE": self.stride, "TILES": tiles, "POWER": self.power,
            "BN": tile.bn * max(1, tile.panels), "BK": tile.bk, "BM": tile.bm, "PARTS": parts_of(tile.bn, tile.bk),
            "PANELS": tile.panels, "DEEP": tile.deep, "AHEAD": 0, "HELD": 0, "EARLY": False, "DEPENDENT": True,
        }  # fmt: skip

    @property
    def kind(self) -> str:
        return KIND[self.precision]

    def close(self, got: np.ndarray, wanted: np.ndarray, scale: float = 1.0) -> None:
        """Equal up to the rounding of the stored numbers and of sums in fp32."""
        assert np.isfinite(got).all()
        allowed = ROUNDING[self.precision] * np.abs(wanted) + 4e-6 * scale + (1e-7 if self.precision == "fp16" else 0)
        assert (np.abs(got - wanted) <= allowed).all(), np.abs(got - wanted).max()


def cases() -> list[Any]:
    out = []
    for at, (size, tile) in enumerate(zip(SIZES, TILES, strict=True)):
        for precision in ("fp16", "bf16"):
            name = f"{size}-{precision}"
            marks = pytest.mark.slow if precision == "bf16" else ()
            out.append(pytest.param(size, tile, precision, (2, 4, 5)[at], (4, 1, 9)[at], None, id=name, marks=marks))
    for at, (dtype, group, d, f, *tile) in enumerate(CODES):
        size = (d, 2, d // 2, -(-d // 16) * 8, f, 130)
        precision = ("fp16", "bf16", "fp32")[at % 3]
        name = f"{dtype}-{group}-{precision}"
        marks = () if precision == "fp16" else pytest.mark.slow
        out.append(pytest.param(size, Tile(*tile), precision, 2, (4, 1)[at % 2], (dtype, group), id=name, marks=marks))
    for tile, size, rows, query, codes in MANY:
        name = "-".join(["many", *(str(each) for each in codes or (tile.bn, tile.panels))])
        out.append(pytest.param(size, tile, "fp16", rows, query, codes, id=name))
    return out


Codes = tuple[str, int] | None
SPLITS = [
    pytest.param(*case.values, split, id=f"{case.id}-{split}", marks=case.marks)
    for at, case in enumerate(cases())
    for split in ((1, 2, 3) if case.values[-1] is None else (1 + at % 3,))
]
EMBED = pytest.mark.parametrize(("size", "tile", "precision", "rows", "query", "codes"), cases()[:6])
CASES = pytest.mark.parametrize(("size", "tile", "precision", "rows", "query", "codes"), cases())


@CASES
def test_qkv(size: tuple[int, ...], tile: Tile, precision: str, rows: int, query: int, codes: Codes) -> None:
    (d, heads, head, padded, _, _), (bn, bk, bm, *_), m, slots = size, tile, rows * query, 24
    case = Case(m, d, 3, bm, precision)
    inner = heads * head
    raw = np.zeros((d, 3 * heads, padded), np.float32)
    raw[..., :head] = case.rng.normal(size=(d, 3 * heads, head)) / np.sqrt(d)
    weights = case.pack(
        raw.reshape(d, -1), codes, K=d, N=3 * inner, BN=bn, BK=bk, ORDER="pairs", HEAD=head, PADDED=padded
    )
    angles = case.rng.uniform(0, 6, (slots, padded // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    write = case.rng.integers(0, slots - query, rows)
    write[0] = slots - 1  # its padded positions lie behind the last slot: dropped
    positions = write[:, None] + np.arange(query)
    q = empty((m, heads, padded), precision)
    past = [empty((rows, heads, slots, padded), precision) for _ in range(2)]
    constants = case.sizes(3, tile) | {
        "QUERY": query, "HEADS": heads, "HEAD": head, "PADDED": padded, "ANGLES": slots, "SLOTS": slots, "SCALE": 0.25,
    }  # fmt: skip
    arguments = {
        "h": (case.kind, case.h), "ss": ("*fp32", case.ss), **weights.arguments,
        "gains": ("*fp32", case.gains), "cos": ("*fp32", cos), "sin": ("*fp32", sin),
        "positions": ("*i64", positions), "write": ("*i64", write), "q": (case.kind, q),
        "past_k": (case.kind, past[0]), "past_v": (case.kind, past[1]), "M": ("i32", m),
    }  # fmt: skip
    launch("step.qkv", constants | weights.constants, (-(-m // bm), weights.blocks(tile)), arguments, shuffle=1)

    product = (case.normed() @ weights.wide).reshape(rows, query, 3, heads, padded)
    at = np.minimum(positions, slots - 1)
    c, s = (table[at][:, :, None, None, :].astype(np.float64) for table in (cos, sin))
    turned = product[:, :, :2]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = np.stack([even * c - odd * s, odd * c + even * s], -1).reshape(turned.shape)
    case.close(wide(q).reshape(rows, query, heads, padded)[..., :head], 0.25 * turned[:, :, 0, :, :head])
    for kept, wanted in zip(past, (turned[:, :, 1], product[:, :, 2]), strict=True):
        got = wide(kept)
        for row in range(rows):
            written = range(int(write[row]), min(int(write[row]) + query, slots))
            case.close(got[row][:, list(written)], wanted[row, : len(written)].transpose(1, 0, 2))
            assert np.isnan(np.delete(got[row], list(written), axis=1)).all()  # nothing else is touched
            assert (got[row][:, list(written), head:] == 0).all()


@pytest.mark.parametrize(("size", "tile", "precision", "rows", "query", "codes", "split"), SPLITS)
def test_residual(
    size: tuple[int, ...], tile: Tile, precision: str, rows: int, query: int, codes: Codes, split: int
) -> None:
    (d, _, _, _, k, _), (bn, bk, bm, *_), m = size, tile, rows * query
    case, tiles = Case(m, d, 1, bm, precision), -(-d // bn)
    split = min(split, -(-k // bk))
    weights = case.pack(case.matrix(k, d), codes, K=k, N=d, BN=bn, BK=bk)
    stride = round_up(k, 64)
    inputs = empty((round_up(m, bm), stride), precision)
    inputs[:m, :k] = stored(case.rng.normal(size=(m, k)), precision)
    blocks, across = -(-m // bm), weights.blocks(tile)
    counters = np.zeros((blocks, across), np.int32)
    before, results = case.x.copy(), []
    for shuffle in (None, 1, 2):
        x, h = before.copy(), empty(case.h.shape, precision)
        ss = np.full((round_up(m, bm), tiles), np.nan, np.float32)
        partial = np.full((blocks, across, split, bm, bn * tiles // across), np.nan, np.float32)
        arguments = {
            "inputs": (case.kind, inputs), **weights.arguments, "gains": ("*fp32", case.gains),
            "x": ("*fp32", x), "h": (case.kind, h), "ss": ("*fp32", ss), "partial": ("*fp32", partial),
            "counters": ("*i32", counters), "M": ("i32", m),
        }  # fmt: skip
        constants = {key: v for key, v in case.sizes(1, tile).items() if key not in ("TILES", "POWER")}
        constants |= {"K": k, "K_STRIDE": stride, "SPLIT": split} | weights.constants
        launch("step.residual", constants, (blocks, across, split), arguments, shuffle=shuffle)
        assert (counters == 0).all()
        results.append((x, h, ss))
    for other in results[1:]:  # whichever block arrives last
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes()
    x, h, ss = results[0]
    wanted = before[:m, :d].astype(np.float64) + wide(inputs)[:m, :k] @ weights.wide
    assert np.abs(x[:m, :d] - wanted).max() < 1e-5
    case.close(wide(h)[:m, :d], x[:m, :d].astype(np.float64) * case.gains[:d])
    assert np.allclose(ss[:m].sum(1), np.square(x[:m, :d].astype(np.float64)).sum(1), rtol=1e-5)
    assert np.isnan(x[m:]).all()
    assert np.isnan(ss[m:]).all()


@CASES
def test_gates(size: tuple[int, ...], tile: Tile, precision: str, rows: int, query: int, codes: Codes) -> None:
    (d, _, _, _, f, _), (bn, bk, bm, *_), m = size, tile, rows * query
    case = Case(m, d, 2, bm, precision)
    weights = case.pack(case.matrix(d, 2 * f), codes, K=d, N=2 * f, BN=bn, BK=bk, ORDER="halves")
    stride = round_up(f, 64)
    g = empty((round_up(m, bm), stride), precision)
    arguments = {
        "h": (case.kind, case.h), "ss": ("*fp32", case.ss), **weights.arguments,
        "gains": ("*fp32", case.gains), "g": (case.kind, g), "M": ("i32", m),
    }  # fmt: skip
    constants = case.sizes(2, tile) | {"F": f, "F_STRIDE": stride}
    launch("step.gates", constants | weights.constants, (-(-m // bm), weights.blocks(tile)), arguments)
    gate, up = np.split(case.normed() @ weights.wide, 2, axis=1)
    case.close(wide(g)[:m, :f], gate / (1 + np.exp(-gate)) * up, scale=8)
    assert np.isnan(wide(g)[m:]).all()
    assert np.isnan(wide(g)[:, f:]).all()


@CASES
def test_head(size: tuple[int, ...], tile: Tile, precision: str, rows: int, query: int, codes: Codes) -> None:
    (d, _, _, _, _, v), (bn, bk, bm, *_) = size, tile
    images, rows, count = rows, 2 * rows, rows * query
    case = Case(rows * query, d, 2, bm, precision)
    weights = case.pack(case.matrix(d, v), codes, K=d, N=v, BN=bn, BK=bk)
    cond = case.rng.permutation(rows)[:images].astype(np.int64)
    uncond = case.rng.permutation(rows)[:images].astype(np.int64)
    uncond[0] = cond[0]  # not guided
    guidance = case.rng.uniform(1, 4, images).astype(np.float32)
    logits = np.full((images, query, v), np.nan, np.float32)
    arguments = {
        "h": (case.kind, case.h), "ss": ("*fp32", case.ss), **weights.arguments,
        "gains": ("*fp32", case.gains), "cond_row": ("*i64", cond), "uncond_row": ("*i64", uncond),
        "guidance": ("*fp32", guidance), "logits": ("*fp32", logits), "COUNT": ("i32", count),
    }  # fmt: skip
    constants = case.sizes(2, tile) | {"QUERY": query, "V": v} | weights.constants
    launch("step.head", constants, (-(-2 * count // bm), weights.blocks(tile)), arguments)
    product = (case.normed() @ weights.wide).reshape(rows, query, v)
    c, u = product[cond], product[uncond]
    assert np.abs(logits - (u + (c - u) * guidance[:, None, None])).max() < 1e-4
    guidance[0] = 1e20  # times a difference of exactly nothing
    before = logits[0].copy()
    launch("step.head", constants, (-(-2 * count // bm), weights.blocks(tile)), arguments)
    assert (logits[0] == before).all()


@pytest.mark.parametrize(
    ("bn", "bk", "bm", "k", "split", "held"),
    [
        (32, 32, 8, 320, 1, 10),  # all of it, in two operands; two parts
        (16, 64, 16, 300, 1, 3),  # two blocks are left; four parts; K ends inside of a block
        (64, 32, 32, 300, 3, 2),  # one operand, of each part of K
        (32, 32, 8, 96, 3, 1),
    ],
)
@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_weights_that_are_held(bn: int, bk: int, bm: int, k: int, split: int, held: int, quick: bool) -> None:
    d, m = 40, 7
    case, tiles = Case(m, d, 1, bm, "fp16"), -(-d // bn)
    weights = case.pack(case.matrix(k, d), K=k, N=d, BN=bn, BK=bk)
    stride, rows = round_up(k, 64), round_up(m, bm)
    inputs = empty((rows, stride), "fp16")
    inputs[:m, :k] = stored(case.rng.normal(size=(m, k)), "fp16")
    added = []
    for count in (0, held):
        x, h = case.x.copy(), empty(case.h.shape, "fp16")
        arguments = {
            "inputs": (case.kind, inputs), **weights.arguments, "gains": ("*fp32", case.gains), "x": ("*fp32", x),
            "h": (case.kind, h), "ss": ("*fp32", np.full((rows, tiles), np.nan, np.float32)),
            "partial": ("*fp32", np.full((rows // bm, tiles, split, bm, bn), np.nan, np.float32)),
            "counters": ("*i32", np.zeros((rows // bm, tiles), np.int32)), "M": ("i32", m),
        }  # fmt: skip
        constants = {key: v for key, v in case.sizes(1, Tile(bn, bk, bm)).items() if key not in ("TILES", "POWER")}
        constants |= {"K": k, "K_STRIDE": stride, "SPLIT": split, "HELD": count} | weights.constants
        launch("step.residual", constants, (rows // bm, tiles, split), arguments, quick=quick)
        added.append(x[:m, :d] - case.x[:m, :d])
    wanted = wide(inputs)[:m, :k] @ weights.wide
    for each in added:
        assert np.abs(each - wanted).max() < 1e-5
    assert np.abs(added[0] - added[1]).max() < 2e-6


def halves_swapped(weights: Packed) -> None:
    codes = weights.arguments["weights"][1]
    codes[:] = codes << 4 | codes >> 4


def scales_of_the_next_group(weights: Packed) -> None:
    scales = weights.arguments["scales"][1]
    scales[:] = np.roll(scales, -1, 1)


def one_group_too_many(weights: Packed) -> None:
    """Groups as long as a piece, where each half of a piece is one."""
    weights.constants["GROUP"] *= 2


def codes_that_begin_at_zero(weights: Packed) -> None:
    weights.arguments["weights"][1][:] += 1


@pytest.mark.parametrize(
    "bug", [None, halves_swapped, scales_of_the_next_group, one_group_too_many, codes_that_begin_at_zero]
)
def test_wrong_codes_and_scales_are_seen(bug: Callable[[Packed], None] | None) -> None:
    """What the comparisons of this file would say of them."""
    case = Case(8, 96, 2, 8, "fp16")
    weights = case.pack(case.matrix(96, 64), ("int4", 32), K=96, N=64, BN=64, BK=64, ORDER="halves")
    if bug is not None:
        bug(weights)
    g = empty((8, 64), "fp16")
    arguments = {
        "h": (case.kind, case.h), "ss": ("*fp32", case.ss), **weights.arguments, "gains": ("*fp32", case.gains),
        "g": (case.kind, g), "M": ("i32", 8),
    }  # fmt: skip
    constants = case.sizes(2, Tile(64, 64, 8)) | {"F": 32, "F_STRIDE": 64} | weights.constants
    launch("step.gates", constants, (1, 1), arguments, quick=True)
    gate, up = np.split(case.normed() @ weights.wide, 2, axis=1)
    with nullcontext() if bug is None else pytest.raises(AssertionError):
        case.close(wide(g)[:, :32], gate / (1 + np.exp(-gate)) * up, scale=8)


@EMBED
@pytest.mark.parametrize("table", ["fp32", "fp16"])
def test_embed(
    size: tuple[int, ...], tile: Tile, precision: str, rows: int, query: int, codes: Codes, table: str
) -> None:
    d, bn, m = size[0], tile[0], rows * query
    tiles = -(-d // bn)
    case = Case(m, d, tiles, 8, precision)
    entries = stored(case.rng.normal(size=(10, d)), table)
    ids = case.rng.integers(0, 10, (rows, query))
    x, h = np.full(case.x.shape, np.nan, np.float32), empty(case.h.shape, precision)
    ss = np.full((m, tiles), np.nan, np.float32)
    arguments = {
        "ids": ("*i64", ids), "table": (KIND[table], entries), "gains": ("*fp32", case.gains), "x": ("*fp32", x),
        "h": (case.kind, h), "ss": ("*fp32", ss),
    }  # fmt: skip
    constants = {
        "ROWS": 10, "D_MODEL": d, "STRIDE": case.stride, "TILES": tiles, "BN": bn, "TOGETHER": 2, "DEPENDENT": True
    }  # fmt: skip
    launch("step.embed", constants, (m, -(-tiles // 2)), arguments)
    wanted = wide(entries)[ids.reshape(-1)]
    assert (x[:m, :d] == wanted).all()
    case.close(wide(h)[:m, :d], wanted * case.gains[:d])
    assert np.allclose(ss.sum(1), np.square(wanted).sum(1), rtol=1e-5)
