"""Errors of a calibration."""

from __future__ import annotations

from par_runtime.errors import RequestError


class CalibrationError(RequestError):
    """A calibration that cannot be made as it was asked for; the message says what to give instead."""
