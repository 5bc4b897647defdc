"""What rounding the rows themselves to int8 costs, measured on recorded rows: static scales against dynamic ones.

A static scale is fixed beforehand: one for all positions, or one for each class of positions (the class token, codes,
learnable tokens), since these differ in range. A dynamic scale is taken from the row itself, or from each block of it;
this is what the C step does. Static scales are taken from the first half of the images and judged on the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_calibration.record.recording import Recording
from par_calibration.record.rows import KINDS
from par_runtime.bundle import matrix_names
from par_runtime.dtypes import Float, Int
from par_runtime.manifest import MATRICES

Bool = NDArray[np.bool_]
MOST = 127
#: What the rows of a kind of matrix are.
INPUTS = {
    "wqkv": "normed, to wqkv",
    "wo": "attention, to wo",
    "w13": "normed, to w13",
    "w2": "gated, to w2",
    "output": "normed, to the head",
}
WAYS = ("static", "static per class", "dynamic per row", "dynamic per row and group")


@dataclass(frozen=True)
class Range:
    """The rows of one kind of matrix (of all layers) at one class of positions."""

    matrix: str  #: a kind, of ``INPUTS``
    positions: str  #: of ``KINDS``
    rows: int  #: recorded ones, of one layer
    largest: float  #: of all numbers
    typical: float  #: root mean square, of the layer with the largest number
    errors: dict[str, float]  #: way of ``WAYS`` -> relative error of the products, root mean square over layers


def ranges(recording: Recording, matrix: Callable[[str], Float], group: int) -> list[Range]:
    """The table, one matrix in memory at a time; ``matrix`` gives one [K,N] by its name.

    Raises CalibrationError, OSError.
    """
    kind, half = recording.about.kind, recording.about.image < (recording.plan.images + 1) // 2
    judged = ~half if (~half).any() else half
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in matrix_names(recording.bundle):
        short = name.rpartition(".")[2]
        rows, weights = recording.rows(name), matrix(name)
        rounded = _rounded(rows, kind, half, group)
        for index, positions in enumerate(KINDS):
            here = judged & (kind == index)
            if not here.any():
                continue
            wanted = np.square(rows[here] @ weights).sum(dtype=np.float64)
            errors = {
                way: float(np.square((values[here] - rows[here]) @ weights).sum(dtype=np.float64) / max(wanted, 1e-30))
                for way, values in rounded.items()
            }
            every = rows[kind == index]
            largest, rms = float(np.abs(every).max()), float(np.sqrt(np.square(every).mean()))
            found.setdefault((short, positions), []).append(
                {"rows": len(every), "largest": largest, "typical": rms, "errors": errors}
            )
    out = []
    for short in (*MATRICES, "output"):
        for positions in KINDS:
            layers = found.get((short, positions))
            if layers:
                top = max(layers, key=lambda layer: layer["largest"])
                means = {way: float(np.sqrt(np.mean([layer["errors"][way] for layer in layers]))) for way in WAYS}
                out.append(Range(short, positions, top["rows"], top["largest"], top["typical"], means))
    return out


def _rounded(rows: Float, kind: Int, half: Bool, group: int) -> dict[str, Float]:
    """``rows`` [n,K] rounded to int8, by each way."""
    n, k = rows.shape
    size = np.abs(rows).max(1)
    one = np.full((n, 1), size[half].max(), np.float32)
    each = one.copy()
    for index in range(len(KINDS)):
        if (half & (kind == index)).any():
            each[kind == index] = size[half & (kind == index)].max()
    out = {"static": _round(rows, one), "static per class": _round(rows, each)}
    out["dynamic per row"] = _round(rows, size[:, None])
    blocks = rows.reshape(n, -1, group) if k % group == 0 else rows[:, None]
    out["dynamic per row and group"] = _round(blocks, np.abs(blocks).max(2, keepdims=True)).reshape(n, k)
    return out


def _round(values: Float, largest: Float) -> Float:
    scale = np.maximum(largest / np.float32(MOST), np.finfo(np.float32).tiny)
    rounded: Float = np.clip(np.rint(values / scale), -MOST, MOST) * scale
    return rounded


def table(found: list[Range]) -> list[str]:
    """The lines for a terminal."""
    lines = [
        "error of the products where what they multiply is rounded to int8",
        f"{'rows':22}{'positions':>10}{'largest':>9}{'rms':>8}  "
        + "".join(f"{way.replace('dynamic ', ''):>{max(len(way.replace('dynamic ', '')) + 2, 10)}}" for way in WAYS),
    ]
    for one in found:
        columns = "".join(
            f"{f'{100 * one.errors[way]:.2f} %':>{max(len(way.replace('dynamic ', '')) + 2, 10)}}" for way in WAYS
        )
        lines.append(f"{INPUTS[one.matrix]:22}{one.positions:>10}{one.largest:>9.3g}{one.typical:>8.3g}  {columns}")
    return lines


def as_json(found: list[Range]) -> list[dict[str, Any]]:
    """The table for a JSON file."""
    return [asdict(one) for one in found]
