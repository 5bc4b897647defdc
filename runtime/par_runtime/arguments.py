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
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.system import available_cores

log = logging.getLogger(__name__)


MOST_OF_A_REQUEST = 2**20  #: images


def given(value: object) -> str:
    """``value`` for a message: on one line, of bounded length; a number of numpy as the number that it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        with suppress(Exception):  # a tensor that holds no number (PyTorch's device "meta")
            value = value.item()
    return shown(value)


def plain(value: Any) -> Any:
    """``value``; what is an array, of numpy or of another library, as a list, or as a number.

    One of more numbers than any request has stays as it is, as one that has none: a view of one number may have any
    shape and take no memory, a list of it does.
    """
    if not hasattr(value, "tolist") or isinstance(value, type) or entries_of(value) > MOST_OF_A_REQUEST:
        return value
    with suppress(Exception):  # PyTorch's device "meta", and its sparse tensors
        return value.tolist()
    return value


def entries_of(value: Any) -> int:
    """How many numbers an array of any library has; 1 of what is none."""
    shape = getattr(value, "shape", ())
    return math.prod(shape) if isinstance(shape, tuple) and all(isinstance(each, int) for each in shape) else 1


def check_unmasked(name: str, value: Any) -> None:
    """Raise RequestError for a masked array of numpy that has masked entries: they hold anything, and count as any."""
    masked = sys.modules.get("numpy.ma")  # numpy imports it with the first masked array
    if masked is not None and isinstance(value, masked.MaskedArray) and masked.is_masked(value):
        raise RequestError(
            f"{name}: a masked array, some of whose entries are masked; expected a plain array: give "
            "array.filled(VALUE), or array.data where the mask does not matter"
        )


def is_truth(value: object) -> bool:
    """Whether ``value`` is True or False, of Python or of numpy."""
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")


def as_index(value: Any) -> int | None:
    """``value`` as an int, if it is a whole number of Python, numpy or another library; else None. True is none."""
    if is_truth(value) or not hasattr(type(value), "__index__"):
        return None
    if str(getattr(value, "dtype", "")).endswith("bool"):  # of PyTorch: True as a tensor
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
        raise RequestError(f"{name} {given(value)}: expected {either(options)}")


def either(words: Sequence[str]) -> str:
    """ "gif, webp or apng", of one word that one."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def function(name: str, value: Any) -> None:
    """Raise RequestError unless ``value`` can be called, or is None. Nobody would await what an async one returns, or
    ask a generator for its values.
    """
    called = (value, type(value).__call__) if callable(value) else ()
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in called):
        raise _never_run(name, value)
    if any(map(inspect.isgeneratorfunction, called)):
        raise _never_run(name, value, generator=True)
    if value is not None and not callable(value):
        raise RequestError(f"{name} {given(value)}: expected a function, not a {type(value).__name__}")


def check_returned(name: str, value: Any, returned: object) -> None:
    """Raise RequestError where the function ``value`` has ``returned`` what would run only later: a lambda may."""
    if returned is None:
        return
    if inspect.iscoroutine(returned):
        returned.close()  # or Python warns that nobody has awaited it
    if inspect.isawaitable(returned) or inspect.isasyncgen(returned) or inspect.isgenerator(returned):
        raise _never_run(name, value, inspect.isgenerator(returned))


def _never_run(name: str, value: Any, generator: bool = False) -> RequestError:
    if generator:
        return RequestError(
            f"{name} {given(value)}: expected a plain function, not a generator (yield), which never runs"
        )
    return RequestError(
        f"{name} {given(value)}: expected a plain function, not an async one, which would never run; hand over to "
        "an event loop with asyncio.run_coroutine_threadsafe"
    )


def folder(name: str, value: Any) -> Path:
    """``value``, a str or a path, as a Path. Raises RequestError."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(path, str):
        raise RequestError(f"{name} {given(value)}: expected the path of a folder, a str or a Path")
    return Path(path)


def file_name(name: str, value: Any) -> Path:
    """``value``, a str or a path, as a Path that may be the name of a file. Raises RequestError."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise RequestError(f"{name} {given(value)}: expected the name of a file, as str or Path")
    return Path(value)


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
