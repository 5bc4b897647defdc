"""Texts for messages. No torch here, since the command line's errors need none."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with what begins another line, or what a terminal obeys, escaped: names of files come from anybody."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str, most: int) -> str:
    """``message``, printable. One of more than ``most`` characters loses its middle: the beginning says what was given,
    the end how to fix it.
    """
    if len(message) > most:
        message = f"{message[: most // 2]} ... {message[-most // 2 :]}"
    return printable(message)
