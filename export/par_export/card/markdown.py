"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from par_runtime.checked import UNPRINTABLE

LONGEST = 160  #: characters of a text in a table


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; "Nothing was measured." without lines."""
    if not lines:
        return "Nothing was measured."
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells)


def bullets(texts: Iterable[str]) -> str:
    """A list in Markdown; "" without texts."""
    return "\n".join(f"- {plain(text)}" for text in texts)


def plain(text: str) -> str:
    """``text`` in one line that ends no list and no comment, and that no terminal obeys: it comes from a file."""
    flat = " ".join(text.split()).replace("<!--", "<! --").replace("-->", "-- >")
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], flat)


def _cell(text: str) -> str:
    flat = plain(text).replace("|", "/")
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 3] + "..."
