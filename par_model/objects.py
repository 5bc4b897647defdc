"""Objects of JSON files. No torch here, since the scripts of the recipe that prepare data need only numpy."""

from __future__ import annotations

from collections import Counter
from typing import Any


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these ``pairs``, for ``object_pairs_hook`` of :func:`json.loads`.

    Raises ValueError for a name that is given twice: Python would take the last of its values, another reader the
    first, and nobody knows which one was meant.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the name {twice[:60]!r} twice; give it once")
    return found
