"""Images to tokens and back, without the model: the bundle's image tokenizer on ONNX Runtime's CPU.

A backend decodes on its own device. Encoding always runs here, on the CPU: it is one call per image that a user gives,
where generation takes tens or hundreds of calls, so it is not worth a plan for each GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError, how_to_install
from par_runtime.known import given_tokens
from par_runtime.request import array, check_threads

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

#: The most pixels per call of encoder and decoder, which bounds their memory: 32 images of 64x64, 2 of 256x256. One
#: image is always taken, for instance of 384x384.
CHUNK_PIXELS = 2**17


def chunk_images(bundle: Bundle) -> int:
    """How many images encoder and decoder take in one call; ``bundle`` has a tokenizer."""
    assert bundle.image_size is not None
    height, width = bundle.image_size
    return max(1, CHUNK_PIXELS // (height * width))


class Tokenizer:
    """Encoder and decoder of a bundle; each is loaded when it is first used. ``threads`` of the CPU, default all cores.

    Raises RequestError where the bundle ends at tokens, or onnxruntime is missing.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if bundle.image_size is None:
            raise RequestError(f"{bundle.path}: this bundle ends at tokens; export it with a tokenizer for images")
        check_threads(threads)
        try:
            from par_runtime.backends.ort import sessions  # here, because importing onnxruntime takes a while
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise RequestError(
                f"encoding an image needs onnxruntime, which is not installed; {how_to_install('cpu')}"
            ) from error
        self.bundle = bundle
        self._ort = sessions
        self._threads = threads
        self._sessions: dict[str, InferenceSession] = {}

    def encode(self, images: ArrayLike) -> Int:
        """Tokens [B,N] int64 in sequence order of ``images``, uint8 [B,H,W,3] or [H,W,3] of the bundle's size.

        Raises RequestError where the bundle has no encoder, or the images have another shape or type.
        """
        if "encoder" not in self.bundle.graphs:
            raise RequestError(
                f"{self.bundle.path}: this bundle has no encoder, so it cannot turn images into tokens; export it "
                "again without --no-encoder"
            )
        assert self.bundle.image_size is not None
        given = array("images", images)
        shape = (*self.bundle.image_size, 3)
        if given.dtype != np.uint8 or given.ndim not in (3, 4) or given.shape[-3:] != shape:
            raise RequestError(
                f"images have shape {given.shape} and type {given.dtype}; expected uint8 {list(shape)}, or a "
                "batch of such images"
            )
        batch = given.reshape(-1, *shape)
        return (
            self._chunked("encoder", "images", batch) if len(batch) else np.zeros((0, self.bundle.n_tokens), np.int64)
        )

    def decode(self, tokens: ArrayLike) -> NDArray[np.uint8]:
        """Images [B,H,W,3] uint8 of ``tokens`` [N] or [B,N] in sequence order, one or more. Raises RequestError."""
        count = len(np.atleast_2d(array("tokens", tokens)))
        return self._chunked("decoder", "tokens", given_tokens(self.bundle, count, tokens))

    def _chunked(self, graph: str, name: str, values: NDArray[Any]) -> NDArray[Any]:
        session = self._session(graph)
        size = chunk_images(self.bundle)
        starts = range(0, len(values), size)
        return np.concatenate([self._ort.run(session, name, values[i : i + size]) for i in starts])

    def _session(self, graph: str) -> InferenceSession:
        if graph not in self._sessions:
            self._sessions[graph] = self._ort.open_session(self.bundle, graph, self._ort.session_options(self._threads))
        return self._sessions[graph]
