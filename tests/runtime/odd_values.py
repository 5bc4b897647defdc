"""Objects that a message must not show as they are."""

from __future__ import annotations

from typing import Any


class Huge:
    def __repr__(self) -> str:
        return "x" * 10**6 + "\n"


class Broken:
    """A class of somebody else that fails wherever it is looked at."""

    def fails(self, *_: object) -> Any:
        raise ZeroDivisionError

    __repr__ = __index__ = __float__ = __len__ = fails
