"""Decoding on ONNX Runtime's CPU: images, and clips one latent frame after another."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from par_runtime.backends.base import Decoder, NoDecoder, closed_error
from par_runtime.backends.ort.sessions import LazySession
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.loaded import LoadedFiles
from par_runtime.manifest_video import FIRST, NEXT


def open_ort_decoder(files: LoadedFiles, options: ort.SessionOptions, huge_pages: bool = False) -> Decoder:
    """The decoder of the bundle of ``files``, of images or of clips. It reads its weights at its first use."""
    if files.bundle.image_size is None:
        return NoDecoder(files.bundle)
    return (OrtVideoDecoder if files.bundle.video else OrtDecoder)(files, options, huge_pages)


class OrtDecoder:
    """``decoder.onnx`` on the CPU; ``backends.base.Decoder`` describes the calls."""

    def __init__(self, files: LoadedFiles, options: ort.SessionOptions, huge_pages: bool = False) -> None:
        self.name, self.computes = f"onnxruntime-cpu {ort.__version__}", "fp32"
        self._session = LazySession(files, "decoder", options, huge_pages)

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] of ``tokens`` [B,N] in sequence order. Raises BundleError, MemoryError."""
        return self._session.run("tokens", tokens)

    def close(self) -> None:
        """Free the session."""
        self._session.close()


class OrtVideoDecoder:
    """``decoder_first.onnx``, then ``decoder_next.onnx`` for each other latent frame, on the CPU.

    Memory is that of one latent frame, however long a clip is. What the convolutions need of earlier frames goes from
    call to call without a copy. Several threads may use it.
    """

    def __init__(self, files: LoadedFiles, options: ort.SessionOptions, huge_pages: bool = False) -> None:
        self.name, self.computes = f"onnxruntime-cpu {ort.__version__}", "fp32"
        self._bundle = files.bundle
        self._first = LazySession(files, FIRST, options, huge_pages)
        self._next = LazySession(files, NEXT, options, huge_pages)
        self._closed = False

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """Clips [B,T,H,W,3] of ``tokens`` [B,f*h*w] of the first f latent frames, T frames of these.

        Raises BundleError, MemoryError, RequestError.
        """
        bundle, size = self._bundle, self._bundle.frame_tokens
        if not len(tokens) or tokens.shape[1] % size or not 0 < tokens.shape[1] <= bundle.n_tokens:
            raise RequestError(
                f"tokens to decode have shape {tokens.shape}; expected [B,{bundle.n_tokens}], or the {size} tokens of "
                "each of the first latent frames"
            )
        latent = tokens.shape[1] // size
        height, width = bundle.image_size or (0, 0)
        out = np.empty((len(tokens), bundle.frames_of(latent), height, width, 3), np.uint8)
        past: list[ort.OrtValue] = []
        for at in range(latent):
            if self._closed:
                raise closed_error(bundle)
            given = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens[:, at * size : (at + 1) * size]))
            feed = {"tokens": given} | {f"past.{i}": value for i, value in enumerate(past)}
            images, *past = (self._next if at else self._first).run_values(feed)
            del feed  # the past before this one, which takes as much memory
            out[:, bundle.frames_of(at) : bundle.frames_of(at + 1)] = images.numpy()
        return out

    def close(self) -> None:
        """Free the sessions."""
        self._closed = True
        self._first.close()
        self._next.close()
