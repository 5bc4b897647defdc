"""Order, input layout, visibility and phases of PAR on a T x H x W grid. No torch here.

These facts are defined in this module only. The model and the export import it; the runtime gets the numbers through
the manifest of a bundle.

``k`` is a token's index in sequence order, ``p`` an input position. Input positions hold

    0            class embedding               (no rotary angle: cos = sin = 0)
    1 .. n       z[0 .. n-1]
    n+1 .. 2n-1  learnable tokens M_1..M_{n-1} (no rotary angle)
    p >= 2n      z[p-n]

and the output at position p predicts z[p], for every p. Source: paper, sections 3.2 and 3.3, and the behaviour of the
published code.
Without sequential initial tokens (ablation) the class and the learnable tokens are positions 0 .. n-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from par_model.config import ROPE_BASE, PARConfig

PhaseName = Literal["prefill", "sequential", "transition", "group"]

CLASS, TOKEN, LEARNABLE = 0, 1, 2  # kinds of input


def token_order(config: PARConfig) -> np.ndarray:
    """Raster index (frame, row, column) of every token in sequence order: [N] int64.

    Distant order: groups take local positions in raster order; within a group, regions in raster order.
    Video (ours, because nothing published defines it): frame, then local position, then region.
    """
    frames, height, width = config.grid
    if config.order == "raster":
        return np.arange(config.n_tokens, dtype=np.int64)
    s = math.isqrt(config.group_size)
    region_h, region_w = height // s, width // s
    # Axes of the raster grid, split: [T, u, a, v, b] with u, v the region and a, b the local position.
    raster = np.arange(config.n_tokens, dtype=np.int64).reshape(frames, s, region_h, s, region_w)
    return raster.transpose(0, 2, 4, 1, 3).reshape(-1)  # [T, a, b, u, v]


def token_coordinates(config: PARConfig) -> np.ndarray:
    """(frame, row, column) of every token in sequence order: [N,3] int64."""
    return np.stack(np.unravel_index(token_order(config), config.grid), axis=1).astype(np.int64)


def input_kinds(config: PARConfig) -> tuple[np.ndarray, np.ndarray]:
    """What each input position holds: ``kind`` [N] (CLASS, TOKEN, LEARNABLE) and ``index`` [N] int64.

    ``index`` is k for a token z[k], m for learnable token M_{m+1}, 0 for the class.
    """
    n, total = config.group_size, config.n_tokens
    initial = n if config.sequential_initial else 0
    kind = [CLASS] + [TOKEN] * initial + [LEARNABLE] * (n - 1)
    index = [0, *range(initial), *range(n - 1)]
    remaining = total - len(kind)
    kind += [TOKEN] * remaining
    index += range(initial, initial + remaining)
    return np.array(kind, dtype=np.int64), np.array(index, dtype=np.int64)


def visible_length(config: PARConfig) -> np.ndarray:
    """How many input positions, counted from 0, each position may attend to: [N] int64."""
    p = np.arange(config.n_tokens, dtype=np.int64)
    if config.causal_groups:
        return p + 1
    n = config.group_size
    end_of_group = (p // n) * n + n
    if not config.sequential_initial:
        return end_of_group
    return np.where(p < n, p + 1, end_of_group)


@dataclass(frozen=True)
class Phase:
    """``repeat`` calls of ``query`` positions each, the first at input position ``start``."""

    name: PhaseName
    query: int
    repeat: int
    start: int


def phases(config: PARConfig) -> tuple[Phase, ...]:
    """The calls of one image, in order: n + N/n - 1 of them (paper, section 3.2). A phase may have none."""
    n, total = config.group_size, config.n_tokens
    if not config.sequential_initial:
        return (Phase("transition", n, 1, 0), Phase("group", n, total // n - 1, n))
    return (
        Phase("prefill", 1, 1, 0),
        Phase("sequential", 1, n - 1, 1),
        Phase("transition", n, 1, n),
        Phase("group", n, total // n - 2, 2 * n),
    )


def rotary_table(config: PARConfig, base: float = ROPE_BASE) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [N, D/2] float32 by input position; zero rows for class and learnable tokens.

    Images: the first D/4 pairs are rotated by the row, the others by the column, with frequencies base^(-2i/(D/2)).
    Video (ours): a third of the pairs is rotated by the row and a third by the column; the remaining pairs come first
    and are rotated by the frame. A zero row turns q and k into zero vectors ("no position"); it does not leave them
    unrotated. The published weights were trained this way.
    """
    pairs = config.head_dim // 2
    if config.grid[0] == 1:
        split = (0, pairs // 2, pairs - pairs // 2)
    else:
        split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    kind, index = input_kinds(config)
    place = token_coordinates(config)[np.where(kind == TOKEN, index, 0)]  # [N, 3]
    angles = []
    for axis, count in enumerate(split):
        # fp32 throughout, in the published code's order of operations, so that cos and sin are rounded alike.
        i = np.arange(count, dtype=np.float32)
        frequency = np.float32(1.0) / np.power(
            np.float32(base), i * 2 / np.float32(2 * max(count, 1)), dtype=np.float32
        )
        angles.append(place[:, axis, None].astype(np.float32) * frequency[None])
    angle = np.concatenate(angles, axis=1)  # [N, D/2]
    is_token = (kind == TOKEN)[:, None].astype(np.float32)
    return np.cos(angle) * is_token, np.sin(angle) * is_token
