"""Single arguments, checked: a whole number, a number, true or false, one of several words, a function.

Each bad value is one RequestError that says what was given, and what is expected. Numbers of numpy count as numbers
everywhere; True and False never do.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
import os
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.system import available_cores

log = logging.getLogger(__name__)


def given(value: object) -> str:
    """``value`` for a message: on one line, of bounded length; a number of numpy as the number that it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return shown(value)


def plain(value: Any) -> Any:
    """``value``; what is an array, of numpy or of another library, as a list, or as a number."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def is_truth(value: object) -> bool:
    """Whether ``value`` is True or False, of Python or of numpy."""
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def as_index(value: Any) -> int | None:
    """``value`` as an int, if it is a whole number of Python, numpy or another library; else None. True is none."""
    if is_truth(value) or not hasattr(type(value), "__index__"):
        return None
    try:
        return operator.index(value)
    except Exception:  # an array of several numbers, a time of numpy
        return None


def whole(name: str, value: Any, least: int, most: int | None = None, where: str = "") -> int:
    """``value`` as an int, ``least`` .. ``most``; ``where``: what sets the largest value. Raises RequestError."""
    number = as_index(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} {given(value)}: expected {limits}{where}, a whole number")
    return number


def number(name: str, value: Any, least: float, most: float, expected: str) -> float:
    """``value`` as a float, ``least`` .. ``most``; -0.0 becomes 0.0. ``expected``: for the RequestError."""
    value = plain(value)
    try:
        as_float = None if is_truth(value) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an int beyond all floats
        as_float = math.inf
    except Exception:  # of a class that only says it is a number
        as_float = None
    if as_float is None:
        raise RequestError(f"{name} {given(value)}: expected {expected}; not a {type(value).__name__}")
    if not (math.isfinite(as_float) and least <= as_float <= most):
        raise RequestError(f"{name} {given(value)}: expected {expected}")
    return as_float + 0.0


def truth(name: str, value: Any) -> bool:
    """``value`` as a bool: True, False, 1 or 0. Raises RequestError."""
    value = plain(value)
    if is_truth(value) or (isinstance(value, Real) and value in (0, 1)):
        return bool(value)
    raise RequestError(f"{name} {given(value)}: expected True or False")


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Raise RequestError unless ``value`` is one of these words."""
    if not isinstance(value, str) or value not in options:
        raise RequestError(f"{name} {given(value)}: expected {', '.join(options[:-1])} or {options[-1]}")


def function(name: str, value: Any) -> None:
    """Raise RequestError unless ``value`` can be called, or is None. Nobody would await what an async one returns."""
    if callable(value) and any(map(inspect.iscoroutinefunction, (value, type(value).__call__))):
        raise RequestError(
            f"{name} {given(value)}: expected a plain function, not an async one, which would never run; hand over to "
            "an event loop with asyncio.run_coroutine_threadsafe"
        )
    if value is not None and not callable(value):
        raise RequestError(f"{name} {given(value)}: expected a function, not a {type(value).__name__}")


def folder(name: str, value: Any) -> Path:
    """``value``, a str or a path, as a Path. Raises RequestError."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(path, str):
        raise RequestError(f"{name} {given(value)}: expected the path of a folder, a str or a Path")
    return Path(path)


def cpu_threads(threads: Any) -> int | None:
    """The number of threads of the CPU that is used where ``threads`` are asked for; None stays None (all cores).

    More threads than cores are reduced to the cores, with a UserWarning: they wait for each other, and a call takes up
    to a hundred times as long. Raises RequestError.
    """
    if threads is None:
        return None
    count, cores = whole("threads", threads, 1), available_cores()
    if count <= cores:
        return count
    message = f"threads {given(threads)}: reduced to {cores}, the cores that this process may use"
    log.info(message)
    warnings.warn(message, UserWarning, stacklevel=3)
    return cores
