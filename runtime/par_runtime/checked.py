"""Input that may be anything: files that are no files, JSON made to break its reader, values too long to print.

Whatever parvis reads from a file of JSON goes through here, so that each fault has one short message.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from par_runtime.errors import UNPRINTABLE as UNPRINTABLE
from par_runtime.errors import printed
from par_runtime.reading import unreadable

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
    if isinstance(value, bytes | bytearray):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > 100:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if not isinstance(value, dict | list | tuple | set):
        return _on_one_line(value)
    text, brackets = "", "{}" if isinstance(value, dict | set) else "[]" if isinstance(value, list) else "()"
    for entry in value:
        if levels == 0 or len(text) > limit:
            text += "..."
            break
        key = f"{_text(entry, limit, levels - 1)}: " if isinstance(value, dict) else ""
        text += (", " if text else "") + key
        text += _text(value[entry] if isinstance(value, dict) else entry, limit, levels - 1)
    return f"{brackets[0]}{text}{brackets[1]}"


def _on_one_line(value: object) -> str:
    """``repr(value)``, which may be of many lines (arrays), hold anything, or fail, for what others have written."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return printed(" ".join(text.split()))


def shown_path(path: object) -> str:
    """A path for a message: as it is, unless it is longer than a system's paths, or a terminal would obey it."""
    text = str(path)
    return text if len(text) <= 1000 and not UNPRINTABLE.search(text) else shown(text)


def load_json(text: str | bytes, what: str, error: Callable[[str], Exception]) -> Any:
    """The value of a JSON text. ``what`` names the text in messages, for instance a path.

    Refused with ``error``, beside what is no JSON: numbers that are not finite (Python would read ``Infinity``, NaN and
    1e999), integers of more than :data:`MOST_DIGITS` digits, more than :data:`MOST_NESTED` levels, text that is not
    Unicode (half a surrogate pair cannot be printed), and objects that have a name twice (which value counts?).
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_float,
            object_pairs_hook=_object,
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the name {shown(twice, 60)} twice; give it once")
    return found


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

    Links are followed. What to do stands behind it where the system is at fault (``reading.advised``).
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "missing"
    except OSError as fault:
        return unreadable(fault)
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


def open_regular(path: Path) -> BinaryIO:
    """The file ``path``, opened to be read. What is no regular file is an OSError that says what it is.

    Nothing waits, also where a pipe takes the place of the file at this very moment: what was opened is looked at.
    """
    descriptors: list[int] = []
    opened: list[io.FileIO] = []
    try:
        open_descriptor(path, descriptors)
        opened.extend(map(io.FileIO, descriptors))  # as in open_descriptor
        return io.BufferedReader(opened[0])
    except BaseException:
        if opened:
            opened[0].close()
        else:
            for each in descriptors:
                os.close(each)
        raise


def open_descriptor(path: Path, into: list[int]) -> None:
    """Put the descriptor of :func:`open_regular` ``into`` a list; the caller closes what is there, also after an error.

    Python calls the handler of a signal between a call and the storing of its result, and a handler may raise: what was
    opened would stay open for ever. So the result goes into the list before Python runs anything else.
    """
    why = _why_not(os.stat(path).st_mode)  # opening a device may already do something
    if why is None:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        into.extend(map(os.open, (path,), (flags,)))
        why = _why_not(os.fstat(into[-1]).st_mode)
    if why is not None:
        raise OSError(errno.EINVAL, why, str(path))


def read_regular(path: Path, limit_bytes: int, error: Callable[[str], Exception]) -> bytes:
    """The content of the file ``path``. Raises ``error`` where it is no regular file, or longer than ``limit_bytes``.

    A pipe, a device or a socket is refused before it is opened, so nothing waits; a too large file before it is read.
    What ``error`` gets may end with what to do (``reading.advised``).
    """
    why = why_not_regular(path)
    if why is not None:
        raise error(f"{path}: {why}")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    except OSError as fault:
        raise error(f"{path}: {unreadable(fault)}") from fault
    if size > limit_bytes or len(content) > limit_bytes:
        raise error(f"{path}: {max(size, len(content))} bytes; expected at most {limit_bytes}")
    return content


class Mismatch(ValueError):  # noqa: N818, it is no failure of the program
    """A value of a file is not what the file's format says; the message has its place, itself and what is expected."""


def is_text(value: object, most: int) -> TypeGuard[str]:
    """Whether ``value`` is a text of 1 to ``most`` characters that can be printed."""
    return isinstance(value, str) and 1 <= len(value) <= most and UNPRINTABLE.search(value) is None


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a JSON file with its place in it, for instance "phases[2].query". Methods return it checked.

    All raise :class:`Mismatch`.
    """

    value: Any
    place: str = ""

    def refuse(self, expected: str) -> NoReturn:
        """Raise Mismatch: the value, and what is ``expected``."""
        raise Mismatch(f"{self.place or 'the file'} is {shown(self.value)}; expected {expected}")

    def integer(self, least: int = 0, most: int = 2**53) -> int:
        """The value, if it is a whole number from ``least`` to ``most``; ``True`` is none."""
        if type(self.value) is not int or not least <= self.value <= most:
            self.refuse(f"{least}" if least == most else f"a whole number from {least} to {most}")
        return self.value

    def number(self, least: float, most: float) -> float:
        """The value, if it is a number from ``least`` to ``most``."""
        if type(self.value) not in (int, float) or not least <= self.value <= most:
            self.refuse(f"a number from {least:.4g} to {most:.4g}")
        return float(self.value)

    def boolean(self) -> bool:
        """The value, if it is true or false."""
        if type(self.value) is not bool:
            self.refuse("true or false")
        return self.value

    def text(self, most: int = 200) -> str:
        """The value, if it is a text of 1 to ``most`` characters that can be printed."""
        if not is_text(self.value, most):
            self.refuse(f"a text of 1 to {most} printable characters")
        return self.value

    def match(self, pattern: str, expected: str) -> str:
        """The value, if it is a text of the whole regular expression ``pattern``."""
        if not isinstance(self.value, str) or len(self.value) > 1000 or not re.fullmatch(pattern, self.value):
            self.refuse(expected)
        return self.value

    def one_of(self, choices: Collection[str]) -> str:
        """The value, if it is one of ``choices``."""
        if not isinstance(self.value, str) or self.value not in choices:
            self.refuse(f"one of {', '.join(choices)}")
        return self.value

    def file_name(self, owner: str) -> str:
        """The value, if it is the name of a file in the folder of its ``owner``: "bundle" or "engine"."""
        name = self.value
        if not isinstance(name, str) or not 1 <= len(name) <= 255 or UNPRINTABLE.search(name):
            self.refuse("the name of a file")
        if name in (".", "..") or "/" in name or "\\" in name or ":" in name:
            raise Mismatch(f"file {shown(name)} is not one of the {owner}'s own")
        return name

    def entries(self, least: int = 0, most: int = 2**24) -> Iterator[Value]:
        """The entries of the value, if it is a list of ``least`` to ``most`` of them."""
        if not isinstance(self.value, list) or not least <= len(self.value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            self.refuse(f"a list of {count} entries" + self._length())
        return (Value(entry, f"{self.place}[{i}]") for i, entry in enumerate(self.value))

    def integers(self, least: int, most: int, count: int | None = None) -> list[int]:
        """The value, if it is a list of whole numbers from ``least`` to ``most``, ``count`` of them if given.

        For long lists: no object is made for each entry.
        """
        self.entries(*(() if count is None else (count, count)))
        for i, entry in enumerate(self.value):
            if type(entry) is not int or not least <= entry <= most:
                Value(entry, f"{self.place}[{i}]").integer(least, most)
        numbers: list[int] = self.value
        return numbers

    def object(self, most: int = 2**16) -> dict[str, Any]:
        """The value, if it is an object of at most ``most`` entries."""
        if not isinstance(self.value, dict) or len(self.value) > most:
            self.refuse(f"an object of at most {most} entries" + self._length())
        return self.value

    def items(self, most: int = 2**16) -> Iterator[tuple[str, Value]]:
        """The entries of the value by name, if it is an object of at most ``most`` of them with printable names."""
        for name in self.object(most):
            yield Value(name, f"a name in {self.place or 'the file'}").text(), self[name]

    def __getitem__(self, name: str) -> Value:
        """The entry ``name`` of the value, which must be an object that has it."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        if name not in self.value:
            raise Mismatch(f"no entry {shown(name)}" + (f" in {self.place}" if self.place else ""))
        short = name if re.fullmatch("[A-Za-z0-9_.-]{1,60}", name) else shown(name, 60)
        return Value(self.value[name], f"{self.place}.{short}" if self.place else short)

    def get(self, name: str) -> Value | None:
        """The entry ``name`` of the value; None where it is missing or null."""
        if isinstance(self.value, dict) and self.value.get(name) is None:
            return None
        return self[name]

    def _length(self) -> str:
        return f" (it has {len(self.value)})" if isinstance(self.value, list | dict) else ""
