"""Decoding on ONNX Runtime's CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backends.ort.sessions import LazySession
from par_runtime.dtypes import Int
from par_runtime.loaded import LoadedFiles


class OrtDecoder:
    """``decoder.onnx`` on the CPU; ``backends.base.Decoder`` describes the calls."""

    def __init__(self, files: LoadedFiles, options: ort.SessionOptions, huge_pages: bool = False) -> None:
        self.name = f"onnxruntime-cpu {ort.__version__}"
        self._session = LazySession(files, "decoder", options, huge_pages)

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] of ``tokens`` [B,N] in sequence order. Raises BundleError, MemoryError."""
        return self._session.run("tokens", tokens)

    def close(self) -> None:
        """Free the session."""
        self._session.close()
