"""Lines of a stage: what it emits for the report."""

from __future__ import annotations

from collections.abc import Callable

from par_runtime.bench.rows import median, spread

#: Takes a line of a stage: its kind, and whatever belongs to it.
Emit = Callable[..., None]


def limit(emit: Emit, name: str, unit: str, samples: list[float], how: str) -> None:
    """Emit one of the card's limits: the median of ``samples`` in ``unit``, and how it was measured."""
    emit("limit", name=name, unit=unit, value=median(samples), spread=spread(samples), samples=samples, how=how)
