"""The command ``parvis``: one module per verb. ``dispatch.py`` lists them and runs one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code, see :func:`par_runtime.cli.dispatch.main`."""
    try:
        # Here and not above, so that Ctrl-C in the tenth of a second that imports take is no traceback of Python's.
        from par_runtime.cli.dispatch import main as run
    except KeyboardInterrupt:
        print("\nparvis: stopped; nothing was half-written", file=sys.stderr)
        return 130
    return run(argv)
