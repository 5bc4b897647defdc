"""Images or clips to tokens and back, without the model: the bundle's tokenizer on the CPU.

A backend decodes on its own device. Encoding always runs here, on ONNX Runtime's CPU: it is one call per image that a
user gives, where generation takes tens or hundreds of calls, so it is not worth a plan for each GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from par_runtime.arguments import choice, cpu_threads, truth
from par_runtime.backends.base import ends_at_tokens, image_shape
from par_runtime.backends.ort import needing
from par_runtime.bundle import Bundle
from par_runtime.clips import files
from par_runtime.dtypes import DECODER_PRECISIONS, Int, Rounding
from par_runtime.errors import BundleError, RequestError
from par_runtime.forks import no_fork, tell_of_forks
from par_runtime.images.photo import Fit, Pictures, fit_image, to_pixels
from par_runtime.known import decodable_tokens
from par_runtime.late import importing
from par_runtime.loaded import LoadedFiles
from par_runtime.request import array

if TYPE_CHECKING:
    from par_runtime.backends.base import Decoder
    from par_runtime.backends.ort.sessions import LazySession

#: The most pixels per call of encoder and decoder, which bounds their memory: 32 images of 64x64, 2 of 256x256. One
#: image is always taken, for instance of 384x384. Of clips a decoder takes some latent frames at a time, as its own
#: memory allows; here one is counted.
CHUNK_PIXELS = 2**17


def pixels(bundle: Bundle) -> tuple[int, int]:
    """(H, W) of the bundle's images. Raises RequestError where it ends at tokens."""
    if bundle.image_size is None:
        raise ends_at_tokens(bundle)
    return bundle.image_size


def chunk_images(bundle: Bundle, encoder: bool = False) -> int:
    """How many images or clips the decoder takes in one call, or the ``encoder``; ``bundle`` has a tokenizer."""
    assert bundle.image_size is not None
    height, width = bundle.image_size
    # What the decoder keeps of earlier frames of clips takes as much memory as the frames themselves.
    frames = 1 if not bundle.video else bundle.frames if encoder else 2 * bundle.time_downsampling
    return max(1, CHUNK_PIXELS // (height * width * frames))


def _with_encoder(bundle: Bundle) -> str:
    """How to come to a bundle with an encoder."""
    if not bundle.selftest["labels"]:  # made by 'parvis bench', not by an export
        return "it holds random weights, for benchmarks: take a bundle that 'parvis export' made of a checkpoint"
    return "take a bundle that has one, or export it again without --no-encoder"


class Tokenizer:
    """Encoder and decoder of a bundle, as they are now; each is loaded when it is first used.

    ``threads`` of the CPU, default all cores; ``decoder_precision``: as ``Pipeline.load`` has it; ``least_exact``: in
    bf16, round as the CPU that rounds the most does, if this one can, however fast (for a proof). Several threads may
    use it at a time. Raises RequestError where the bundle ends at tokens, BundleError where it cannot be read.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        decoder_precision: str = "auto",
        *,
        least_exact: bool = False,
    ) -> None:
        self._size = pixels(bundle)
        self._threads = cpu_threads(threads)
        choice("decoder_precision", decoder_precision, ("auto", *DECODER_PRECISIONS))
        self._precision = bundle.rounding(Rounding(decoder_precision=decoder_precision)).decoder_precision
        self._least_exact = truth("least_exact", least_exact)
        self.bundle = bundle
        self._files = LoadedFiles(bundle)
        self._encoder: LazySession | None = None
        self._decoder: Decoder | None = None
        self._lock = threading.Lock()  #: of both
        self._closed = False
        tell_of_forks(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it

    def close(self) -> None:
        """Free encoder and decoder; the tokenizer cannot be used afterwards."""
        self._closed = True
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(self._files.close)
            for each in (self._decoder, self._encoder):
                if each is not None:
                    parts.callback(each.close)

    def encode(self, images: Pictures, fit: Fit = "crop") -> Int:
        """Tokens [B,N] int64 in sequence order of ``images``: a path, a PIL image, uint8 [H,W,3], a list of these, or
        uint8 [B,H,W,3]. A video bundle takes clips, uint8 [T,H,W,3] or [B,T,H,W,3].

        What has another size than the bundle's images is fitted: by its largest middle part ("crop"), or stretched.
        Raises RequestError where the bundle has no encoder, or something is no picture; OSError.
        """
        if "encoder" not in self.bundle.graphs:
            raise RequestError(
                f"{self.bundle.path}: this bundle has no encoder, so it cannot turn images into tokens; "
                f"{_with_encoder(self.bundle)}"
            )
        if self.bundle.video:
            name = os.fspath(images) if isinstance(images, (str, os.PathLike)) else ""
            each = [fitted_clip(self.bundle, one, fit, name) for one in _clips(self.bundle, images)]
            batch = np.stack(each) if each else np.zeros((0, *image_shape(self.bundle)), np.uint8)
        else:
            batch = to_pixels(images, self._size, fit)
        if not len(batch):
            return np.zeros((0, self.bundle.n_tokens), np.int64)
        with needing("encoding an image"), importing("par_runtime.backends.ort.sessions"):
            from par_runtime.backends.ort.sessions import LazySession, session_options
        with self._lock:
            self._check_open()
            if self._encoder is None:
                self._encoder = LazySession(self._files, "encoder", session_options(self._threads))
            encoder = self._encoder
        return self._chunked(partial(encoder.run, "images"), batch, encoder=True)

    def decode(self, tokens: ArrayLike) -> NDArray[np.uint8]:
        """Images [B,H,W,3] uint8 of ``tokens`` [N] or [B,N] in sequence order; clips [B,T,H,W,3] of a video bundle,
        also of the tokens [B,f*h*w] of the first f latent frames. Raises RequestError.
        """
        known = decodable_tokens(self.bundle, tokens)
        with importing("par_runtime.backends.native.decoding"):
            from par_runtime.backends.native.decoding import open_decoder
        with needing("decoding an image"), no_fork(), self._lock:
            self._check_open()
            if self._decoder is None:
                self._decoder = open_decoder(self._files, self._threads, self._precision, self._least_exact)
            decoder = self._decoder
        if not len(known):
            return np.zeros((0, *image_shape(self.bundle)), np.uint8)
        return self._chunked(decoder.run, known)

    def _chunked(
        self, run: Callable[[NDArray[Any]], NDArray[Any]], values: NDArray[Any], encoder: bool = False
    ) -> NDArray[Any]:
        size = chunk_images(self.bundle, encoder)
        try:
            return np.concatenate([run(values[i : i + size]) for i in range(0, len(values), size)])
        except (RequestError, BundleError):
            self._check_open()  # another thread may have closed it, which says what it did to each part
            raise

    def _check_open(self) -> None:
        """Raise RequestError where the tokenizer was closed."""
        if self._closed:
            raise RequestError(f"{self.bundle.path}: the tokenizer was closed; load it again")


def _clips(bundle: Bundle, clips: object) -> list[NDArray[np.uint8]]:
    """``clips``, a path or uint8 [T,H,W,3] or [B,T,H,W,3], as frames [T',H',W',3] of each. Raises RequestError."""
    if isinstance(clips, (str, os.PathLike)):
        return read_clips(bundle, Path(clips))
    given = array("clips", clips)  # type: ignore[arg-type]
    if given.dtype != np.uint8 or given.ndim not in (4, 5) or given.shape[-1] != 3:
        one = ",".join(map(str, image_shape(bundle)))
        raise RequestError(
            f"clips have shape {given.shape} and type {given.dtype}; expected a path, uint8 [{one}] or [B,{one}]"
        )
    return list(given.reshape(-1, *given.shape[-4:]))


def read_clips(bundle: Bundle, path: Path) -> list[NDArray[np.uint8]]:
    """The frames [T',H',W',3] of each clip in the file at ``path``: of a sheet of parvis of the bundle's size all, of
    any other file one. Raises RequestError, OSError.
    """
    file = files.read_any(path, bundle.frames)
    sheet = file.clips(pixels(bundle))
    return [file.frames] if sheet is None else list(sheet)


def fitted_clip(bundle: Bundle, frames: NDArray[np.uint8], fit: Fit, name: str = "") -> NDArray[np.uint8]:
    """``frames`` [T',H',W',3] as a clip [T,H,W,3] of the bundle: its first frames, each fitted as an image is.

    Raises RequestError where there are too few; ``name`` begins its text.
    """
    size = pixels(bundle)
    if len(frames) < bundle.frames:
        if name:
            count = f"{len(frames)} frame{'s' if len(frames) > 1 else ''}"
            raise RequestError(f"{name}: has {count}; expected a clip of {bundle.frames} or more")
        one = ",".join(map(str, image_shape(bundle)))
        raise RequestError(
            f"a clip of {len(frames)} frames; expected uint8 [{one}], or more frames than these (repeat the last one: "
            "tokens of earlier latent frames do not depend on later ones)"
        )
    frames = frames[: bundle.frames]
    if frames.shape[1:3] == size:
        return frames
    return np.stack([fit_image(Image.fromarray(frame), size, fit) for frame in frames])
