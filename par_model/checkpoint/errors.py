"""The error of everything that reads a checkpoint, what its message shows of a file, and names for libraries."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from par_model.words import one_line

LONGEST_MESSAGE = 1000  # characters


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message states what was given, what is expected and how to fix it.

    The message is one printable line, even where a file holds names with control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, LONGEST_MESSAGE))


def some(names: Iterable[object], count: int = 3) -> str:
    """The first ``count`` of ``names`` for a message, each cut to 80 characters."""
    names = list(names)
    return ", ".join(str(name)[:80] for name in names[:count]) + (", ..." if len(names) > count else "")


def shown(value: object) -> str:
    """``value`` for a message, as Python writes it, at most 80 characters."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a very large integer"
    text = repr(value[:100] if isinstance(value, (str, bytes, list, tuple)) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def utf8_name(path: Path) -> str | None:
    """The name of ``path`` for a library that takes names in UTF-8 and no others; None where the name is not UTF-8."""
    try:
        return str(path) if os.name == "nt" else os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return None
