"""The command line in the process of the tests."""

from __future__ import annotations

from par_runtime.cli import dispatch as cli


def run(*arguments: object) -> int:
    """The exit code of ``parvis`` with these arguments."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
