"""Input that may be anything: files that are no files, JSON made to break its reader, values too long to print.

Whatever parvis reads from a file of JSON goes through here, so that each fault has one short message.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

#: Objects and lists inside each other: more than any file of parvis has, and far from Python's limit of recursion.
MOST_NESTED = 32
#: Digits of an integer. Python takes time that grows with the square of it.
MOST_DIGITS = 100


def shown(value: object, limit: int = 80) -> str:
    """``value`` for a message: as Python writes it, at most ``limit`` characters, what a terminal obeys escaped.

    Costs little, however large ``value`` is.
    """
    text = _text(value, limit, 3)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(value: object, limit: int, levels: int) -> str:
    """At least the first ``limit`` characters of ``value``; its entries are followed ``levels`` deep."""
    if isinstance(value, str):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > 100:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if not isinstance(value, dict | list | tuple):
        return repr(value)
    text, brackets = "", "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
    for entry in value:
        if levels == 0 or len(text) > limit:
            text += "..."
            break
        key = f"{_text(entry, limit, levels - 1)}: " if isinstance(value, dict) else ""
        text += (", " if text else "") + key
        text += _text(value[entry] if isinstance(value, dict) else entry, limit, levels - 1)
    return f"{brackets[0]}{text}{brackets[1]}"


def load_json(text: str | bytes, what: str, error: type[Exception]) -> Any:
    """The value of a JSON text. ``what`` names the text in messages, for instance a path.

    Refused with ``error``, beside what is no JSON: numbers that are not finite (Python would read ``Infinity``, NaN and
    1e999), integers of more than :data:`MOST_DIGITS` digits, more than :data:`MOST_NESTED` levels, and text that is
    not Unicode (half a surrogate pair cannot be printed).
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_float,
        )
        _check_values(value)
    except RecursionError:
        raise error(f"{what}: not valid JSON (nested more than {MOST_NESTED} levels deep)") from None
    except UnicodeError as fault:
        raise error(f"{what}: not valid JSON (not UTF-8: {fault.reason if hasattr(fault, 'reason') else ''})") from None
    except ValueError as fault:  # JSONDecodeError too
        raise error(f"{what}: not valid JSON ({fault})") from None
    return value


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits; expected at most {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    number = float(text) if len(text) <= 1000 else math.nan
    if not math.isfinite(number):
        raise ValueError(f"number {shown(text, 40)[1:-1]}; expected a finite one")
    return number


def _check_values(value: object) -> None:
    """Raise RecursionError or UnicodeEncodeError for what :func:`load_json` refuses after parsing."""
    level: list[object] = [value]
    for _ in range(MOST_NESTED + 1):
        inner: list[object] = []
        for each in level:
            if isinstance(each, str):
                if not each.isascii():
                    each.encode()
            elif isinstance(each, dict):
                inner += each.keys()
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise RecursionError


def why_not_regular(path: Path) -> str | None:
    """Why ``path`` is not a file that can be read without waiting for somebody to write it, or None where it is.

    Links are followed.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "missing"
    except OSError as fault:
        return f"cannot be read ({fault.strerror})"
    except ValueError:  # a zero byte in the name
        return "cannot be read (no valid file name)"
    return _why_not(mode)


def _why_not(mode: int) -> str | None:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    if stat.S_ISREG(mode):
        return None
    return f"is {next((kind for test, kind in kinds.items() if test(mode)), 'something else')}, not a file"


def read_regular(path: Path, limit_bytes: int, error: type[Exception]) -> bytes:
    """The content of the file ``path``. Raises ``error`` where it is no regular file, or longer than ``limit_bytes``.

    A pipe, a device or a socket is refused before it is opened, so nothing waits; a too large file before it is read.
    """
    why = why_not_regular(path)
    if why is not None:
        raise error(f"{path}: {why}")
    try:
        # Not waiting also where the file became a pipe since the check.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            why = _why_not(os.fstat(descriptor).st_mode)
            if why is not None:
                raise error(f"{path}: {why}")
            size = os.fstat(descriptor).st_size
            content = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    except OSError as fault:
        if fault.errno == errno.EISDIR:
            raise error(f"{path}: is a folder, not a file") from None
        raise error(f"{path}: cannot be read ({fault.strerror})") from fault
    if size > limit_bytes or len(content) > limit_bytes:
        raise error(f"{path}: {max(size, len(content))} bytes; expected at most {limit_bytes}")
    return content
