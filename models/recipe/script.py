"""How a script of the recipe ends: one line for what it cannot use, and no half-written file where it is stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from par_model.training.files import InputError
from par_model.words import printable
from par_runtime.stopping import exit_on_signals
from par_runtime.system import explain


def run(name: str, work: Callable[[], int], *expected: type[Exception]) -> int:
    """Do ``work`` for the script ``name``; returns its exit code.

    2 where it raises InputError, OSError, MemoryError or one of ``expected``, which is printed as one line; 130, 143 or
    129 where Ctrl-C, SIGTERM or the end of its terminal stopped it, which it meets as an exception, so that unfinished
    files are removed.
    """
    try:
        with exit_on_signals():
            return work()
    except (InputError, OSError, *expected) as error:
        text = explain(error) if isinstance(error, OSError) else str(error)
        print(f"{name}: error: {printable(text)}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"{name}: error: not enough memory; close other programs, or give it less to do", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as stop:  # of a signal
        code = stop.code if isinstance(stop.code, int) else 1
    print(f"\n{name}: stopped; nothing was half-written", file=sys.stderr)
    return code
