"""The command ``parvis``: one module per verb. ``dispatch.py`` lists them and runs one."""

from par_runtime.cli.dispatch import main

__all__ = ["main"]
