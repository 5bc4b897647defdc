"""All errors that the runtime raises on purpose. The command line prints each as one line and exits with code 2.

A message says what was given, what is expected, and how to fix it.
"""

from __future__ import annotations


class BundleError(Exception):
    """A bundle that cannot be used."""


class EngineError(BundleError):
    """An engine that cannot be used; the message names the command that builds it again."""


class RequestError(ValueError):
    """A request that cannot be served."""


class CudaError(Exception):
    """A call of the CUDA driver failed. ``code`` is its name, for instance "CUDA_ERROR_NO_DEVICE"."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class OutOfMemory(CudaError):  # noqa: N818, the usual name of this error
    """An allocation on a GPU did not fit. Sizes in bytes."""

    def __init__(self, message: str, requested_bytes: int, free_bytes: int, total_bytes: int) -> None:
        super().__init__(message, "CUDA_ERROR_OUT_OF_MEMORY")
        self.requested_bytes, self.free_bytes, self.total_bytes = requested_bytes, free_bytes, total_bytes


class TensorRTMissingError(Exception):
    """No usable TensorRT is installed; the message says what to install."""


def how_to_install(extra: str) -> str:
    """The words that say how to install an extra of ``parvis``, for instance "cpu" or "cpu,export"."""
    return f"pip install 'parvis[{extra}]' (in a clone: pip install '.[{extra}]')"
