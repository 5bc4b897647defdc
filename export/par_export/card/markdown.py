"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 160  #: characters of a text in a table


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; "Nothing was measured." without lines."""
    if not lines:
        return "Nothing was measured."
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells)


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."
