"""What the verbs of ``par_export`` share: errors as one line and an exit code, and the types of their arguments."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from par_export.errors import BuildCancelledError, BuildError, ExportError, OutputError, ParityError
from par_export.kernels.request import NARROW
from par_runtime.backends.engines import MOST_BATCH
from par_runtime.cli.common import fail, out_of_memory
from par_runtime.dtypes import PRECISIONS
from par_runtime.errors import BundleError, CudaError, RequestError, TensorRTMissingError, how_to_install
from par_runtime.system import explain

#: Errors that end a verb with one line and exit code 2.
EXPECTED: tuple[type[Exception], ...] = (
    BuildError,
    BundleError,
    CudaError,
    ExportError,
    OSError,
    OutputError,
    RequestError,
    TensorRTMissingError,
)
#: option -> why an engine of kernels does not have it.
PLANS_ONLY = {
    "--engines": "an engine of kernels is always shared, one list of launches for every phase",
    "--sampling": "kernels sample exactly, with every top-k and top-p",
    "--attention": "kernels have one form of attention",
    "--visible": "kernels read as many keys as each row has",
    "--norm": "kernels always apply a norm to the product behind it",
    "--reproducible": "kernels are compiled without timing anything, so the same build is always the same",
}
ENGINES = ("tensorrt", "kernels")  #: kinds of engines; the first is the default


def guarded(
    work: Callable[[], int],
    *,
    expected: tuple[type[Exception], ...] = (),
    stopped: str = "nothing was written",
    no_permission: str | None = None,
    out: Path | None = None,
) -> int:
    """Run ``work`` and return its exit code; errors that are expected become one line on stderr and an exit code.

    2 for errors of :data:`EXPECTED` and ``expected``, 1 for a failed parity gate, 130 for Ctrl-C, after which
    ``stopped`` states what was written. ``no_permission`` is the advice where a file may not be written. ``out`` is the
    folder that the verb writes, where it writes one.
    """
    caught = (*EXPECTED, *expected)
    try:
        return work()
    except ParityError as error:
        return fail(error, 1)
    except caught as error:
        if not isinstance(error, OSError):
            return fail(error)
        elsewhere = out is not None and error.filename and not _is_at(str(error.filename), out)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and no_permission is not None and not elsewhere:
            return fail(f"no permission to write {error.filename or out} ({error.strerror}); {no_permission}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and out is not None and _is_in(error.filename, out):
            return fail(
                f"no space left on the disk of {out} ({error.strerror}); free some or give another --out (nothing was "
                "left behind)"
            )
        return fail(explain(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no class for it
            raise
        return fail(out_of_memory(error, "run it where there is more (nothing was written)"))
    except (BuildCancelledError, KeyboardInterrupt):
        print(f"\nparvis: stopped; {stopped}", file=sys.stderr)
        return 130


def _is_in(file: str | None, out: Path) -> bool:
    """Whether ``file`` is ``out``, in it, or a folder above it, or unknown; a report beside it is none of these."""
    path, wanted = Path(file or out).absolute(), out.absolute()
    return path.is_relative_to(wanted) or wanted.is_relative_to(path)


def _is_at(file: str, out: Path) -> bool:
    """Whether ``file`` is ``out``, in it, or a folder above it; a checkpoint or a cache is elsewhere."""
    path, wanted = Path(file).absolute(), out.absolute()
    return path.is_relative_to(wanted.parent) or wanted.is_relative_to(path)


def check_kernels(args: argparse.Namespace) -> None:
    """Raise BuildError where an option was given that only plans of TensorRT have."""
    for option, why in PLANS_ONLY.items():
        if getattr(args, option.strip("-"), None):
            raise BuildError(f"{option}: {why}; leave it out, or give --engine tensorrt")


@contextmanager
def needed_for_kernels() -> Iterator[None]:
    """Imports that only engines of kernels need. Raises BuildError where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:  # what plans are built with does not help here
        install = how_to_install("kernels-build")
        raise BuildError(f"--engine kernels needs {error.name}, which is not installed; {install}") from None


def count(text: str) -> int:
    """A number of images from 1 to 256, for argparse."""
    return _whole(text, "a number of images")


def times(text: str) -> int:
    """How often something is done, from 1 to 256, for argparse."""
    return _whole(text, "a number")


def _whole(text: str, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST_BATCH:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {what} from 1 to {MOST_BATCH}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Such numbers, separated by commas, in ascending order."""
    return tuple(sorted({count(part) for part in text.split(",")}))


def precision(text: str) -> str:
    """The type of ``--precision`` of engines: says why some that one may hope for are none; choices do the rest."""
    if text in NARROW:
        raise argparse.ArgumentTypeError(
            f"engines do not compute in {text}: {NARROW[text]}; expected {', '.join(PRECISIONS)}. Weights of int8 and "
            "int4 are the bundle's (parvis calibrate)"
        )
    return text
