"""The error of everything that reads a checkpoint."""

from __future__ import annotations

LONGEST_MESSAGE = 1000  # characters


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message states what was given, what is expected and how to fix it.

    The message is one printable line, even where a file holds names with control characters.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}...")
