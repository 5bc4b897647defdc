"""Whether data and a model, or two sets of data, are of the same classes. No torch here, as in ``files.py``."""

from __future__ import annotations

from collections.abc import Sequence

from par_model.training.raw import shown


def other_class(given: Sequence[str] | None, expected: Sequence[str] | None) -> str | None:
    """How the class names ``given`` differ from those ``expected``, for a message; None where they are the same, or one
    of the two has none.

    Their order counts: a label is a number, and means another class where the names stand in another order.
    """
    if given is None or expected is None:
        return None
    for i, (name, wanted) in enumerate(zip(given, expected, strict=False)):
        if name != wanted:
            return f"class {i} is {shown(name)}, not {shown(wanted)}"
    return None if len(given) == len(expected) else f"has {len(given)} classes, not {len(expected)}"
