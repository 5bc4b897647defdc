"""A sentence about a subject's rows: which limit it runs into, and what would make it faster.

This is a simple rule, not a model of the machine. If a batch takes more than twice the bound, neither reading nor
calculating explains the time; the launches do, with small kernels that read little. Else the limit is that of the
bound: bandwidth or arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from par_runtime.bench.rows import Row
from par_runtime.bench.subjects.base import MODEL_PHASES

#: Below this part of the bound a phase is called launch-bound.
NEAR = 0.5


@dataclass(frozen=True)
class Advice:
    """``kind``: "bandwidth-bound", "compute-bound", "launch-bound" or "decoder-bound"; ``text``: a sentence or two."""

    label: str
    kind: str
    text: str


def advice(rows: Sequence[Row]) -> Advice | None:
    """The advice for the rows of one subject at one batch size; None without an image row, or without bounds."""
    by = {row.phase: row for row in rows}
    image = by.get("image")
    steps = [by[name] for name in MODEL_PHASES if name in by and by[name].bound_ms]
    if image is None or not steps:
        return None
    took = sum(row.median_ms for row in steps)
    main = max(steps, key=lambda row: row.median_ms)
    reached = sum(row.bound_ms or 0.0 for row in steps) / took
    decoder, copy = by.get("decoder"), by.get("copy")
    what = (
        f"{image.label}: {took / image.median_ms:.0%} of an image's time is the model's {image.calls} calls, "
        f"most of it {main.phase}"
    )
    if decoder is not None and decoder.median_ms > took:
        return Advice(
            image.label,
            "decoder-bound",
            f"{image.label}: {decoder.median_ms / image.median_ms:.0%} of an image's time is its decoding, which a "
            "larger n does not shorten; decode in the background of the next batch, or take a smaller decoder",
        )
    if copy is not None and copy.median_ms > 0.25 * image.median_ms:
        return Advice(
            image.label,
            "launch-bound",
            f"{image.label}: {copy.median_ms / image.median_ms:.0%} of an image's time passes between calls, on the "
            "host; a larger batch or a larger n shares it among more tokens",
        )
    if reached < NEAR:
        return Advice(
            image.label,
            "launch-bound",
            f"{what}, at {reached:.0%} of the bound: launch-bound, neither reading weights nor multiplying explains "
            "the time. " + _launch_levers(image),
        )
    kind = f"{main.bound_by}-bound"
    lever = _bandwidth_levers(image) if main.bound_by == "bandwidth" else _compute_levers(image)
    return Advice(image.label, kind, f"{what}, at {reached:.0%} of the bound: {kind}. {lever}")


def _launch_levers(image: Row) -> str:
    if image.device == "cpu":
        return "A larger batch or a larger n does more per call; check that no other process shares the cores."
    return (
        "Capture a whole image as one graph (--capture image), and let 'parvis tune' choose the form with fewer "
        "kernels."
    )


def _bandwidth_levers(image: Row) -> str:
    more = "" if image.n >= 16 else f" a larger n than {image.n} makes fewer calls;"
    store = (
        "half precision or quantised weights are fewer bytes"
        if image.computes == "fp32"
        else "quantised weights are fewer bytes"
    )
    return f"Every call reads all weights:{more} a larger batch shares the reading; {store}."


def _compute_levers(image: Row) -> str:
    unguided = " images without guidance need half of it;" if image.guided else ""
    return f"A larger batch gives no more throughput;{unguided} more cores, or arithmetic in fewer bits, would help."
