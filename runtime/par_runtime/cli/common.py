"""What every verb of ``parvis`` uses: the argument parser, errors as one line, and the progress bar.

``parvis --help`` imports this module, so it imports neither numpy nor ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from par_runtime.errors import BundleError, CudaError, OutputsError, RequestError
from par_runtime.system import explain


class Parser(argparse.ArgumentParser):
    """argparse, with its errors printed as one line, like every other error of ``parvis``."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` as one line and exit with code 2."""
        raise SystemExit(fail(f"{message}; '{self.prog} --help' lists the options"))


def fail(error: object, code: int = 2) -> int:
    """Print ``error`` as the one line of a verb that failed; returns ``code``.

    Characters that would begin another line, or that a terminal obeys, are escaped: names of files may have them.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
    print(f"parvis: error: {text}", file=sys.stderr)
    return code


def guarded(work: Callable[[], int]) -> int:
    """Run ``work`` and return its exit code; an expected failure is printed as one line, and gives exit code 2."""
    try:
        return work()
    except (BundleError, RequestError, CudaError, OutputsError) as error:
        return fail(error)
    except BrokenPipeError:  # of a pipe that a verb opened itself, see dispatch.main
        raise
    except OSError as error:
        return fail(explain(error))
    except MemoryError as error:
        return fail(f"not enough memory for this batch; give a smaller --batch{f' ({error})' if str(error) else ''}")


class Bar:
    """A progress bar over model calls, on stderr. Nothing is shown where ``silent``, or where stderr is no terminal.

    An instance is the ``on_step`` callback of :meth:`par_runtime.Pipeline.generate`.
    """

    def __init__(self, silent: bool) -> None:
        self._bar: Any = None
        self._silent = silent or not sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` calls are made."""
        if self._silent:
            return
        if self._bar is None:
            from tqdm import tqdm  # its import takes 20 ms, so only a terminal pays for it

            self._bar = tqdm(total=total, unit="call", leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
