"""Packing of matrices into panels: every number at its place, nothing else but zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_arrays import KIND, empty, launch, stored, wide

from par_export.kernels.tile_shapes import ProductTile
from par_export.quantised import nearest
from par_runtime.quantised import Quantised


def packed(raw: np.ndarray, kinds: tuple[str, str], **constants: object) -> np.ndarray:
    """``raw`` in panels, by the kernel: [tiles, blocks, BN, BK]; with PART, the parts of their rows in order."""
    c: dict[str, object] = {"ORDER": "plain", "HEAD": 1, "PADDED": 1, "DROP_ROWS": False, "PART": constants["BK"]}
    c |= constants
    tiles, blocks = -(-int(c["N"]) // int(c["BN"])), -(-int(c["K"]) // int(c["BK"]))  # type: ignore[call-overload]
    out = empty((tiles, blocks, int(c["BN"]), int(c["BK"])), kinds[1])  # type: ignore[call-overload]
    arguments = {"raw": (KIND[kinds[0]], raw), "packed": (KIND[kinds[1]], out)}
    launch("pack.panels", c | {"WIDTH": raw.shape[1]}, (tiles, blocks), arguments)
    return out


PLAIN: dict[str, object] = {"ORDER": "plain", "HEAD": 1, "PADDED": 1}


def packed_codes(matrix: Quantised, tile: ProductTile, **constants: Any) -> np.ndarray:
    """The codes of ``matrix`` in pieces, by the kernel: [tiles, pieces, BN, SUB]."""
    k, width = matrix.codes.shape
    rows = tile.sub * 8 // tile.bits
    pieces = -(-k // tile.BK) * (tile.BK // rows)
    c = PLAIN | {"N": width} | constants | {"K": k, "WIDTH": width, "SUB": tile.sub, "PIECES": pieces}
    c |= {"BN": tile.BN, "BITS": tile.bits}
    out = np.full((-(-c["N"] // tile.BN), pieces, tile.BN, tile.sub), 0xFF, np.uint8)  # type: ignore[operator]
    raw = np.frombuffer(matrix.code_bytes(), np.uint8)
    launch("pack.codes", c, out.shape[:2], {"raw": ("*u8", raw), "packed": ("*u8", out)})
    return out


def packed_scales(matrix: Quantised, raw: np.ndarray, tile: ProductTile, **constants: Any) -> np.ndarray:
    """The scales ``raw`` of ``matrix`` as its panels need them, by the kernel: [tiles, groups, BN]."""
    k, width = matrix.codes.shape
    groups = -(-(-(-k // tile.BK) * tile.BK) // tile.group)
    c = PLAIN | {"N": width} | constants | {"K": k, "WIDTH": width, "GROUP": tile.group, "GROUPS": groups}
    c |= {"BN": tile.BN, "TOGETHER": 4}
    precision = {np.dtype(np.float16): "fp16", np.dtype(np.uint16): "bf16", np.dtype(np.float32): "fp32"}[raw.dtype]
    out = empty((-(-c["N"] // tile.BN), groups, tile.BN), precision)  # type: ignore[operator]
    kind = KIND[precision]
    launch("pack.scales", c, (out.shape[0], -(-groups // 4)), {"raw": (kind, raw), "packed": (kind, out)})
    return out


def columns(panels: np.ndarray) -> np.ndarray:
    """The panels [tiles, blocks, BN, BK] as one matrix [K', N'], in packed order."""
    tiles, blocks, bn, bk = panels.shape
    return wide(panels).transpose(1, 3, 0, 2).reshape(blocks * bk, tiles * bn)


@pytest.mark.parametrize("kinds", [("fp32", "fp16"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_plain(kinds: tuple[str, str]) -> None:
    raw = stored(np.random.default_rng(0).normal(size=(40, 50)), kinds[0])
    got = columns(packed(raw, kinds, K=40, N=50, BN=32, BK=16))
    wanted = wide(stored(wide(raw), kinds[1]))
    assert (got[:40, :50] == wanted).all()
    assert (got[40:] == 0).all()
    assert (got[:, 50:] == 0).all()


def test_parts_of_the_rows_lie_one_after_the_other() -> None:
    raw = stored(np.random.default_rng(0).normal(size=(70, 50)), "fp16")
    how = {"K": 70, "N": 50, "BN": 16, "BK": 64}
    whole = packed(raw, ("fp16", "fp16"), **how)
    tiles, blocks, bn, bk = whole.shape
    parts = packed(raw, ("fp16", "fp16"), **how, PART=16).reshape(tiles, blocks, bk // 16, bn, 16)
    assert (parts.transpose(0, 1, 3, 2, 4).reshape(whole.shape) == whole).all()


@pytest.mark.parametrize(("heads", "size", "padded"), [(2, 8, 8), (3, 20, 24), (2, 100, 104), (1, 4, 8)])
def test_pairs_of_heads_meet_eight_apart(heads: int, size: int, padded: int) -> None:
    raw = np.zeros((16, 3 * heads, padded), np.float32)
    raw[..., :size] = np.random.default_rng(0).normal(size=(16, 3 * heads, size))
    inner = 3 * heads * size
    flat = stored(raw.reshape(16, -1), "fp16")
    got = columns(packed(flat, ("fp16", "fp16"), K=16, N=inner, BN=32, BK=16, ORDER="pairs", HEAD=size, PADDED=padded))
    groups = got.reshape(16, -1, 2, 8)  # of 16 columns the first 8 are even ones, the last 8 their odd partners
    pairs = groups.transpose(0, 1, 3, 2).reshape(16, -1)
    wanted = wide(stored(raw[..., :size].reshape(16, -1), "fp16"))
    assert (pairs[:, :inner] == wanted).all()
    assert (pairs[:, inner:] == 0).all()


def test_halves_meet_eight_apart() -> None:
    raw = np.random.default_rng(0).normal(size=(16, 2 * 24)).astype(np.float16)
    got = columns(packed(raw, ("fp16", "fp16"), K=16, N=48, BN=32, BK=16, ORDER="halves")).reshape(16, -1, 2, 8)
    for half in range(2):
        units = got[:, :, half].reshape(16, -1)
        assert (units[:, :24] == raw[:, half * 24 : half * 24 + 24]).all()
        assert (units[:, 24:] == 0).all()


def test_rows_of_padding_are_dropped() -> None:
    raw = np.random.default_rng(0).normal(size=(2 * 104, 16)).astype(np.float16)
    raw.reshape(2, 104, 16)[:, 100:] = np.nan  # never read
    got = columns(packed(raw, ("fp16", "fp16"), K=200, N=16, BN=16, BK=64, HEAD=100, PADDED=104, DROP_ROWS=True))
    assert (got[:200] == raw.reshape(2, 104, 16)[:, :100].reshape(200, 16)).all()
    assert (got[200:] == 0).all()


def test_codes_of_a_byte_are_half_a_piece_apart_and_all_others_are_zeros() -> None:
    matrix = nearest(np.random.default_rng(0).normal(size=(96, 40)).astype(np.float32), "int4", 32)
    tile = ProductTile(32, 128, 1, 4, 2, 0, 4, 32)
    got = packed_codes(matrix, tile)
    assert got.shape == (2, 2, 32, 32)  # each piece has 64 rows of K
    rows = np.stack([got & 15, got >> 4], 2).astype(int) - 8  # [tiles, pieces, halves, BN, SUB]
    codes = rows.transpose(1, 2, 4, 0, 3).reshape(128, 64)
    assert (codes[:96, :40] == matrix.codes).all()
    assert not codes[96:].any()
    assert not codes[:, 40:].any()


@pytest.mark.parametrize("order", ["pairs", "halves"])
def test_codes_and_scales_have_the_columns_of_numbers(order: str) -> None:
    """Each code has the place that its number has, and each scale that of its column."""
    matrix = nearest(np.random.default_rng(0).normal(size=(64, 2 * 24)).astype(np.float32), "int8", 32)
    how = {"N": 40 if order == "pairs" else 48, "ORDER": order, "HEAD": 20, "PADDED": 24}
    tile = ProductTile(32, 32, 1, 4, 2, 0, 8, 32)
    codes = packed_codes(matrix, tile, **how).astype(int) - 128
    numbers = packed(matrix.codes.astype(np.float32), ("fp32", "fp32"), K=64, BN=32, BK=32, **how)
    assert (codes == numbers).all()
    scales = packed_scales(matrix, matrix.scales.astype(np.float16), tile, **how)
    wanted = packed(matrix.scales, ("fp32", "fp32"), K=2, BN=32, BK=2, **how)
    assert (scales == wanted[:, 0].transpose(0, 2, 1)).all()
