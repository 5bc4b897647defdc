"""All errors that the exporter and the builder raise on purpose. This module needs neither torch nor onnx.

A message contains what was given, what is expected, and how to fix it. ``cli/common.py`` turns each into one line.
"""

from __future__ import annotations


class OutputError(Exception):
    """A folder that cannot be written where it was asked for."""


class ExportError(Exception):
    """An export that cannot be done as asked."""


class ParityError(Exception):
    """The exported graphs do not compute what the model computes; nothing was published."""


class BuildError(Exception):
    """An engine that cannot be built as asked; where a layer is the reason, the message names it."""


class BuildCancelledError(Exception):
    """The build was stopped by Ctrl-C; nothing was written."""
