"""What a backend must do. The pipeline and everything above it use only this protocol, whichever backend runs.

A call of the step network is explicit: it names the batch (which rows, where their keys lie, how their tokens are
drawn), the position of each row, and the inputs. So rows of one call may be at different steps, and images may come and
go between two calls. The only state of a backend is its key-value cache.

Letters: R rows in flight (two for a guided image), B images, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import Float, Int
from par_runtime.errors import RequestError

#: The inputs [B] of a step graph that say how each image's tokens are drawn; :meth:`Batch.per_image` gives values.
IMAGE_INPUTS: dict[str, type[np.generic]] = {
    "cond_row": np.int64,
    "uncond_row": np.int64,
    "guidance": np.float32,
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float32,
}
MOST_IN_FLIGHT = 4096  #: in flight on a CPU: the caches of more take tens of gigabytes even for the smallest model
#: ``Backend.tie`` of a CPU in fp32: others have kernels that round differently; the errors measured at export are 50
#: times smaller.
TIE = 1e-4
#: Activations rounded to int8 move every logit: by up to 4 % of the largest one where this was measured.
TIE_INT8 = 1e-1


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """The rows of a call and the settings of their images; the same object serves all calls of the same rows.

    Row b < B is image b with its class; ``uncond_row`` [B] names the row without class of a guided image, or b itself.
    ``cache_row`` [R] is the row of the backend's cache where each row's keys lie (default: row r in cache row r). A
    cache row keeps its keys from call to call, until :meth:`Backend.release`. ``image_of_row`` [R] is the image of each
    row. By default it follows from ``uncond_row``; it is given where an image that is not guided in this call has a row
    without class all the same, whose keys a later call needs.

    Raises ValueError where two rows share a cache row, or one has none.
    """

    rows: int
    uncond_row: Int
    guidance: Float  #: [B]
    temperature: Float  #: [B]
    top_k: Int  #: [B], 0 keeps all
    top_p: Float  #: [B], 1 keeps all
    cache_row: Int = field(default_factory=lambda: np.zeros(0, np.int64))
    image_of_row: Int = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not self.image_of_row.size:
            image_of_row = np.zeros(self.rows, np.int64)
            image_of_row[self.uncond_row] = np.arange(self.images)
            image_of_row[: self.images] = np.arange(self.images)
            object.__setattr__(self, "image_of_row", image_of_row)
        if not self.cache_row.size:
            object.__setattr__(self, "cache_row", np.arange(self.rows))
        given = self.cache_row
        if given.shape != (self.rows,) or given.min() < 0 or len(set(given.tolist())) != self.rows:
            raise ValueError(
                f"cache rows {given.tolist()}; expected {self.rows} different numbers from 0 on, one per row"
            )

    def __repr__(self) -> str:
        return f"Batch({self.images} images, {self.rows} rows)"

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.uncond_row)

    @cached_property
    def cache_rows(self) -> int:
        """How many cache rows a backend must have for this batch."""
        return int(self.cache_row.max()) + 1

    def per_image(self) -> dict[str, NDArray[np.generic]]:
        """The inputs [B] of a step graph for drawing the tokens of each image, by name. Its rows are cache rows."""
        return {
            "cond_row": self.cache_row[: self.images],
            "uncond_row": self.cache_row[self.uncond_row],
            "guidance": self.guidance,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def per_row(self, tokens: Int) -> Int:
        """``tokens`` [B,q] of the images, repeated for the rows: [R,q]. Both rows of a guided image get the same."""
        repeated: Int = tokens[self.image_of_row]
        return repeated


def image_shape(bundle: Bundle) -> tuple[int, ...]:
    """[H,W,3] of an image, or [T,H,W,3] of a clip; zeros where the bundle ends at tokens."""
    height, width = bundle.image_size or (0, 0)
    return (bundle.frames, height, width, 3) if bundle.video else (height, width, 3)


def tensors(bundle: Bundle, query: int) -> dict[str, tuple[Any, ...]]:
    """Every tensor that a program of an engine is bound to, with its shape; the first entry is "R" (rows) or "B"
    (images).

    ``query``: positions of a call, or 0 for the decoder.
    """
    n, q = bundle.n_tokens, query
    if q == 0:
        return {"tokens": ("B", n), "images": ("B", *image_shape(bundle))}
    out: dict[str, tuple[Any, ...]] = dict.fromkeys(("ids", "positions", "tokens"), ("R", q))
    out |= dict.fromkeys(("write", "length", "image"), ("R",))
    out |= dict.fromkeys(IMAGE_INPUTS, ("B",))
    out |= {"uniform": ("B", q), "logits": ("B", q, bundle.vocab_size)}
    cache = ("R", bundle.cache.heads, n, bundle.cache.head_dim)
    return out | dict.fromkeys((*bundle.cache.inputs, *bundle.cache.outputs), cache)


def check_positions(write: Int, query: int, n_tokens: int) -> None:
    """Raise ValueError unless ``query`` positions from ``write`` [R] on lie in 0 .. N-1: beyond, a backend would write
    outside its cache.
    """
    first = write.tolist()  # every call asks, of a few rows: for these, numpy's min and max take longer
    if min(first) < 0 or max(first) + query > n_tokens:
        raise ValueError(f"a call of {query} positions from {first} on; expected positions 0..{n_tokens - 1}")


@dataclass(frozen=True)
class BackendInfo:
    """What a backend is and works with, for reports and bounds."""

    runtime: str  #: "native-cpu", "onnxruntime-cpu", "onnxruntime-cuda", "kernels", "tensorrt", "tensorrt_rtx"
    version: str  #: and the variant, if there are several: "0.1.0 (avx512)", "1.32.0 (step_opset23)"
    device: str  #: "cpu", or the GPU's name
    computes: str  #: the precision it calculates in: "fp32", "fp16", "bf16", "int8"
    weight_bytes: float  #: of one parameter, as a call reads it
    cache_bytes: float  #: of one number of the key-value cache
    decoder: str = ""  #: runtime and version of what makes the pixels, where it is another than the backend's own
    decoder_computes: str = "fp32"  #: the precision that this one calculates in; "fp32" where ``decoder`` is empty

    @property
    def least_exact(self) -> str:
        """The precision whose rounding moves its logits most: of the arithmetic, or of the cache."""
        return "bf16" if self.computes == "fp32" and self.cache_bytes < 4 else self.computes

    @property
    def name(self) -> str:
        """Runtime and version, for timings and metadata."""
        return f"{self.runtime} {self.version}"

    @property
    def rounding(self) -> dict[str, str]:
        """What a CPU rounds to, by the names of ``dtypes.Rounding``; of one that only decodes, beside a GPU, what its
        decoder does.
        """
        step = {}
        if self.device == "cpu":
            step = {"arithmetic": self.computes, "cache": "bf16" if self.cache_bytes < 4 else "fp32"}
        return step | ({"decoder_precision": self.decoder_computes} if self.decoder else {})


class Decoder(Protocol):
    """What turns tokens into pixels on a CPU: in C, or ONNX Runtime."""

    name: str  #: runtime and version, for reports
    computes: str  #: the precision that it calculates in: "fp32", "bf16"

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] of ``tokens`` [B,N] in sequence order; clips [B,T,H,W,3] of a video bundle.

        Of clips, ``tokens`` may be those of the first f latent frames, [B,f*h*w]. Raises BundleError, MemoryError,
        RequestError.
        """
        ...

    def close(self) -> None:
        """Free it."""
        ...


def closed_error(bundle: Bundle) -> RequestError:
    """The error of a backend that is used after ``close``."""
    return RequestError(f"{bundle.path}: the pipeline was closed; load it again with Pipeline.load")


def ends_at_tokens(bundle: Bundle) -> RequestError:
    """The error of pixels that are asked of a bundle that has no tokenizer."""
    return RequestError(f"{bundle.path}: this bundle ends at tokens; export it with a tokenizer for images")


class NoDecoder:
    """The decoder of a bundle that ends at tokens."""

    name, computes = "", "fp32"

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def run(self, tokens: Int) -> NDArray[np.uint8]:
        """Raises RequestError."""
        raise ends_at_tokens(self._bundle)

    def close(self) -> None:
        """Nothing is open."""


class Backend(Protocol):
    """One loaded bundle on one device. Arrays that it returns belong to the caller.

    It makes one call at a time, and takes no lock: whoever calls it from several threads sees to that, as ``Pipeline``
    does. Any thread may make the next call. Between two calls ``decode`` may be called. After ``close``, all methods
    but ``close`` and ``release`` raise RequestError or CudaError. In a forked process, a backend on the CPU goes on (it
    starts threads of its own), and one on a GPU raises CudaError, without a call of the driver.
    """

    info: BackendInfo
    max_images: int  #: largest batch
    tie: float  #: candidates this close (relative to the largest |logit|) may swap by rounding alone

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """One call: ``ids`` [R,q] at input positions from ``write`` [R] on, drawn with ``uniform`` [B,q] in [0,1).

        Row r sees keys 0 .. write[r] + q - 1 of its cache row: those that earlier calls wrote there, and its own. These
        are what the cache row holds afterwards: a call at an earlier position drops the keys behind it. Cache rows that
        no row of ``batch`` names stay as they are.

        Returns tokens [B,q]. Raises MemoryError where the batch needs a larger cache than there is memory for. TensorRT
        then frees everything, and refuses to continue the images that were in flight (ValueError).
        """
        ...

    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        """The logits [B,q,V] of the same call (guided, before temperature). For checks; it may be slow."""
        ...

    def release(self, cache_rows: Int | None = None) -> None:
        """The keys of these cache rows (default: all) are not needed again. Memory stays; calls may become faster."""
        ...

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] of ``tokens`` [B,N] in sequence order; clips [B,T,H,W,3] of a video bundle.

        Of clips, ``tokens`` may be those of the first f latent frames, [B,f*h*w]: it gives the frames of these.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards."""
        ...


@runtime_checkable
class MakesImages(Protocol):
    """A backend that makes all calls of a batch at once, without the host between them.

    All calls have the same rows, so images with a guidance interval are made call by call instead.
    """

    def make_images(
        self, batch: Batch, class_ids: Int, noise: Float, decode: bool
    ) -> tuple[Int, NDArray[np.uint8] | None]:
        """All calls of ``batch``, from the first: its ids are ``class_ids`` [R]; ``noise`` [B,N] in [0,1).

        Returns tokens [B,N], and images [B,H,W,3] or None without ``decode``. The keys of other images are lost.
        """
        ...
