"""All errors that the runtime raises on purpose. The command line prints each as one line and exits with code 2.

A message says what was given, what is expected, and how to fix it.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from par_runtime.late import importing

#: What no message may hold: a terminal obeys it, or it cannot be printed, or it shows text in another order.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class OneLine(Exception):  # noqa: N818, what the errors below have in common
    """An error whose message is of one line: a path, or whatever else it names, may hold anything."""

    def __str__(self) -> str:
        return printed(super().__str__())


def printed(text: str) -> str:
    """``text`` with what :data:`UNPRINTABLE` finds written out, for instance as ``\\n``."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class BundleError(OneLine):
    """A bundle that cannot be used."""


class EngineError(BundleError):
    """An engine that cannot be used; the message names the command that builds it again."""


class RequestError(OneLine, ValueError):
    """A request that cannot be served."""


class BusyError(OneLine, RuntimeError):
    """A request that cannot be taken now, because too many wait already."""


class OutputsError(OneLine):
    """Some of the files of a command were written and one could not be; the message counts them."""


class CudaError(OneLine):
    """A call of the CUDA driver failed. ``code`` is its name, for instance "CUDA_ERROR_NO_DEVICE"."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class OutOfMemory(CudaError):  # noqa: N818, the usual name of this error
    """An allocation on a GPU did not fit. Sizes in bytes."""

    def __init__(self, message: str, requested_bytes: int, free_bytes: int, total_bytes: int) -> None:
        super().__init__(message, "CUDA_ERROR_OUT_OF_MEMORY")
        self.requested_bytes, self.free_bytes, self.total_bytes = requested_bytes, free_bytes, total_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        # By itself an exception is made again of its message alone. A pool of processes ends, or waits for ever, where
        # the error of a worker cannot be read.
        sizes = (self.requested_bytes, self.free_bytes, self.total_bytes)
        return type(self), (str(self), *sizes), self.__dict__


class TensorRTMissingError(OneLine):
    """No usable TensorRT is installed; the message says what to install."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra of ``parvis``, for instance "cpu" or "cpu,export", as it can be typed.

    It names the packages themselves, since parvis is on no package index.
    """
    with importing("shlex"):
        import shlex  # here, as below, because only errors need it

    needed = requirements(extra)
    if not needed:  # not installed, but run from its folders
        return f"pip install '.[{extra}]' in a clone of parvis"
    return f"{pip_command()} install {' '.join(map(shlex.quote, needed))}"


def pip_command() -> str:
    """How to call the pip of this Python: "pip", or with the path of Python where its environment is not activated."""
    with importing("shlex", "shutil"):
        import shlex
        import shutil

    pip = shutil.which("pip")
    ours = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return "pip" if ours or not sys.executable else f"{shlex.quote(sys.executable)} -m pip"


_NAME = re.compile(r"[a-z0-9._-]+")
_EXTRA_OF_OURS = re.compile(r"parvis\[([a-z0-9,-]+)\]")
_MARKER = re.compile(r"""(python_version|extra)\s*(==|>=|<)\s*["']([^"']+)["']""")


def requirements(extra: str) -> list[str]:
    """What an extra of the installed parvis needs on this Python, for instance ["onnxruntime>=1.23"].

    Empty where parvis is not installed. Where onnxruntime-gpu is, onnxruntime is left out: both own the same files.
    """
    with importing("importlib.metadata"):
        from importlib import metadata

    try:
        all_of_them = metadata.requires("parvis") or []
    except metadata.PackageNotFoundError:
        return []
    out = []
    for name in extra.split(","):
        for requirement, _, marker in (entry.partition(";") for entry in all_of_them):
            tests = _MARKER.findall(marker)
            if ("extra", "==", name) in tests and all(_holds(*test) for test in tests if test[0] != "extra"):
                ours = _EXTRA_OF_OURS.fullmatch(requirement.strip())
                out += requirements(ours[1]) if ours else [requirement.strip()]
    with contextlib.suppress(metadata.PackageNotFoundError):
        metadata.version("onnxruntime-gpu")
        out = [requirement for requirement in out if _NAME.match(requirement)[0] != "onnxruntime"]  # type: ignore[index]
    return list(dict.fromkeys(out))


def _holds(_: str, operator: str, version: str) -> bool:
    """Whether a marker of python_version holds."""
    given = tuple(map(int, version.split(".")))
    here = sys.version_info[: len(given)]
    return {"==": here == given, ">=": here >= given, "<": here < given}[operator]
