"""The command ``parvis``: one file per verb, found by ``dispatch.py``."""

from par_runtime.cli.dispatch import main

__all__ = ["main"]
