"""The least time that hardware allows: what calls must read over the bandwidth, what they calculate over the peak.

A call can do both at the same time, so the larger of the two times counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from par_runtime.cost.work import Work


@dataclass(frozen=True)
class Bound:
    """The least time of some calls. ``by``: "bandwidth" or "compute", whichever takes most of it."""

    ms: float
    by: str
    bytes: float
    operations: float


def bound(calls: Sequence[Work], gb_s: float, tflop_s: float | None) -> Bound:
    """The least time of ``calls`` one after the other, in ms; by bandwidth alone if ``tflop_s`` is None."""
    read = [call.bytes / gb_s / 1e6 for call in calls]
    calculate = [call.operations / tflop_s / 1e9 if tflop_s else 0.0 for call in calls]
    by = "bandwidth" if sum(read) >= sum(calculate) else "compute"
    return Bound(
        ms=sum(map(max, read, calculate)),
        by=by,
        bytes=sum(call.bytes for call in calls),
        operations=sum(call.operations for call in calls),
    )
