"""Order, layout, visibility and phases against slow definitions written out from the paper's section 3."""

from __future__ import annotations

import math

import numpy as np
import pytest

from par_model.config import PARConfig
from par_model.ordering import (
    CLASS,
    LEARNABLE,
    TOKEN,
    input_kinds,
    phases,
    rotary_table,
    token_coordinates,
    token_order,
    visible_length,
)


def config(grid: tuple[int, int, int], n: int, **changes: object) -> PARConfig:
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 8, "n_classes": 2}
    return PARConfig(**sizes, grid=grid, group_size=n, **changes)  # type: ignore[arg-type]


CASES = [(side, n) for side in range(4, 25) for n in (1, 4, 16) if side % math.isqrt(n) == 0 and 2 * n <= side * side]


@pytest.mark.parametrize(("side", "n"), CASES)
def test_every_token_is_at_its_defined_place(side: int, n: int) -> None:
    s = math.isqrt(n)
    r = side // s
    place = token_coordinates(config((1, side, side), n))
    for k in range(side * side):
        j, q = divmod(k, n)
        a, b = divmod(j, r)
        u, v = divmod(q, s)
        assert tuple(place[k]) == (0, u * r + a, v * r + b)


@pytest.mark.parametrize(("side", "n"), CASES)
def test_order_is_a_permutation_whose_groups_lie_in_distinct_regions(side: int, n: int) -> None:
    c = config((1, side, side), n)
    assert sorted(token_order(c)) == list(range(side * side))
    r = side // math.isqrt(n)
    for group in token_coordinates(c).reshape(-1, n, 3):
        assert len({(row // r, column // r) for _, row, column in group}) == n
        assert len({(row % r, column % r) for _, row, column in group}) == 1


def test_published_beginnings() -> None:
    start = [tuple(x) for x in token_coordinates(config((1, 24, 24), 4))[:7, 1:]]
    assert start == [(0, 0), (0, 12), (12, 0), (12, 12), (0, 1), (0, 13), (12, 1)]
    start = [tuple(x) for x in token_coordinates(config((1, 24, 24), 16))[:5, 1:]]
    assert start == [(0, 0), (0, 6), (0, 12), (0, 18), (6, 0)]
    assert (token_order(config((1, 24, 24), 1)) == np.arange(576)).all()


def test_video_runs_frame_by_frame() -> None:
    where = token_coordinates(config((5, 16, 16), 4))
    assert (where[:, 0] == np.arange(1280) // 256).all()
    image = token_coordinates(config((1, 16, 16), 4))
    for frame in range(5):
        assert (where[frame * 256 : (frame + 1) * 256, 1:] == image[:, 1:]).all()


@pytest.mark.parametrize(
    ("grid", "n", "calls"),
    [
        ((1, 24, 24), 1, 576),
        ((1, 24, 24), 4, 147),
        ((1, 24, 24), 16, 51),
        ((5, 16, 16), 1, 1280),
        ((5, 16, 16), 4, 323),
        ((5, 16, 16), 16, 95),
        ((1, 16, 16), 1, 256),
        ((1, 16, 16), 4, 67),
        ((1, 16, 16), 16, 31),
    ],
)
def test_call_counts_of_the_paper(grid: tuple[int, int, int], n: int, calls: int) -> None:
    assert sum(phase.repeat for phase in phases(config(grid, n))) == calls


def test_without_sequential_initial_tokens_there_are_144_calls() -> None:
    c = config((1, 24, 24), 4, sequential_initial=False)
    assert sum(phase.repeat for phase in phases(c)) == 144
    kind, _ = input_kinds(c)
    assert kind[:5].tolist() == [CLASS, LEARNABLE, LEARNABLE, LEARNABLE, TOKEN]


@pytest.mark.parametrize("n", [1, 4, 16])
def test_phases_write_every_position_once_and_in_order(n: int) -> None:
    c = config((1, 24, 24), n)
    written = [
        p
        for phase in phases(c)
        for i in range(phase.repeat)
        for p in range(phase.start + i * phase.query, phase.start + (i + 1) * phase.query)
    ]
    assert written == list(range(576))


@pytest.mark.parametrize("n", [1, 4, 16])
def test_input_layout_and_visibility(n: int) -> None:
    c = config((1, 24, 24), n)
    kind, index = input_kinds(c)
    seen = visible_length(c)
    for p in range(576):
        if p == 0:
            assert kind[p] == CLASS
        elif p <= n:
            assert (kind[p], index[p]) == (TOKEN, p - 1)
        elif p < 2 * n:
            assert (kind[p], index[p]) == (LEARNABLE, p - n - 1)
        else:
            assert (kind[p], index[p]) == (TOKEN, p - n)
        assert seen[p] == (p + 1 if p < n else (p // n) * n + n)


def test_no_row_sees_the_token_it_predicts() -> None:
    for n in (1, 4, 16):
        for changes in ({}, {"causal_groups": True}, {"sequential_initial": False}, {"order": "raster"}):
            c = config((1, 8, 8), n, **changes)
            kind, index = input_kinds(c)
            for p, length in enumerate(visible_length(c)):
                visible = index[:length][kind[:length] == TOKEN]
                assert (visible < p).all()


def test_causal_groups_see_a_prefix_only() -> None:
    assert (visible_length(config((1, 8, 8), 4, causal_groups=True)) == np.arange(64) + 1).all()


def test_rotary_table_against_a_loop() -> None:
    c = PARConfig(dim=100, n_layers=1, n_heads=1, vocab_size=8, n_classes=2, grid=(1, 8, 8), group_size=4)
    cos, sin = rotary_table(c)
    kind, index = input_kinds(c)
    where = token_coordinates(c)
    for p in range(64):
        for i in range(25):
            f = 10000 ** (-2 * i / 50)
            for half, place in ((0, 1), (25, 2)):
                angle = where[index[p]][place] * f if kind[p] == TOKEN else None
                expected = (0, 0) if angle is None else (math.cos(angle), math.sin(angle))
                assert (cos[p, half + i], sin[p, half + i]) == pytest.approx(expected, abs=2e-6)


def test_class_and_learnable_rows_are_zero_not_unrotated() -> None:
    cos, sin = rotary_table(config((1, 8, 8), 4))
    for p in (0, 5, 6, 7):
        assert not cos[p].any()
        assert not sin[p].any()
    assert cos[1].all()  # token at (0, 0): angle zero, cosine one


def test_video_rotary_turns_with_the_frame() -> None:
    c = PARConfig(dim=64, n_layers=1, n_heads=1, vocab_size=8, n_classes=2, grid=(2, 4, 4), group_size=4)
    cos, _ = rotary_table(c)
    assert cos.shape == (32, 32)
    kind, index = input_kinds(c)
    first = {int(k): p for p, (k, t) in enumerate(zip(index, kind, strict=True)) if t == TOKEN}
    a, b = cos[first[0]], cos[first[16]]  # the same place in frames 0 and 1
    assert (a[:12] != b[:12]).any()
    assert (a[12:] == b[12:]).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"group_size": 3}, "group_size=3 is not a square"),
        ({"group_size": 16, "grid": (1, 6, 6)}, "does not split into 4x4 equal regions"),
        ({"group_size": 64}, "more than half"),
        ({"grid": (1, 0, 8)}, "expected \\(T, H, W\\)"),
        ({"n_heads": 3}, "dim=16 is not a multiple of n_heads=3"),
        ({"n_heads": 8}, "head size 2"),
        ({"vocab_size": 0}, "vocab_size=0; expected at least 1"),
    ],
)
def test_impossible_configs_are_refused_with_a_reason(changes: dict[str, object], text: str) -> None:
    good: dict[str, object] = {
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "vocab_size": 8,
        "n_classes": 2,
        "grid": (1, 8, 8),
    }
    with pytest.raises(ValueError, match=text):
        PARConfig(**{**good, **changes})  # type: ignore[arg-type]
