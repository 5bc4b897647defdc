"""Where a tensor lies in ``weights.data``: an entry [dtype, shape, offset, length] of a manifest's table, checked.

Backends map, copy and upload by these numbers, and anybody can have written them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from par_runtime.checked import Mismatch, Value, shown

WEIGHTS = "weights.data"


def check_place(entry: Value, size: int, item_bytes: Mapping[str, float]) -> list[Value]:
    """[dtype, shape, offset, length] of a tensor: that they fit each other, and a weights file of ``size`` bytes."""
    dtype, shape, offset, length = entry.entries(4, 4)
    item = item_bytes[dtype.one_of(item_bytes)]
    sizes = shape.integers(1, 2**32)
    start, long = offset.integer(0), length.integer(1)
    if math.ceil(math.prod(sizes) * item) != long:
        length.refuse(f"{math.ceil(math.prod(sizes) * item)} bytes, as a {dtype.value} of shape {shown(sizes)} has")
    if start + long > size:
        offset.refuse(f"{long} bytes inside {WEIGHTS}, which has {size}")
    if start % max(1, int(item)):
        offset.refuse(f"a multiple of {int(item)}")
    return [dtype, shape, offset, length]


def check_overlaps(places: list[tuple[int, int, str]]) -> None:
    """Raise Mismatch where two tensors, (offset, length, name) each, share bytes."""
    places.sort()
    for (start, long, name), (after, _, other) in pairwise(places):
        if start + long > after:
            raise Mismatch(f"weights {shown(name)} and {shown(other)} overlap in {WEIGHTS}")
