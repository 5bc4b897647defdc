"""What a backend must do. The pipeline speaks only to this; one file per backend, all alike.

Letters: R rows in flight (two for a guided image), B images, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from par_runtime.dtypes import Float, Int

Whole = tuple[Int, NDArray[np.uint8] | None]


@dataclass(frozen=True)
class Batch:
    """What stays the same for all calls of a batch. Row b is image b with its class; ``uncond_row`` [B] names the
    row without class of a guided image, or b itself."""

    rows: int
    uncond_row: Int
    guidance: Float  #: [B]
    temperature: Float  #: [B]
    top_k: Int  #: [B], 0 keeps all
    top_p: Float  #: [B], 1 keeps all

    @property
    def images(self) -> int:
        return len(self.uncond_row)


class Backend(Protocol):
    """One loaded bundle on one device."""

    name: str  #: for timings and metadata, with the version
    max_images: int  #: largest batch
    tie: float  #: candidates this close (relative to the largest |logit|) may swap by rounding alone

    def start(self, batch: Batch) -> None:
        """Prepare buffers for ``batch`` and forget the previous one; the cache is empty afterwards."""
        ...

    def step(self, ids: Int, write: int, uniform: Float) -> Int:
        """Run one call: ``ids`` [R,q] at input positions ``write`` .. ``write + q - 1``, ``uniform`` [B,q] in [0,1).

        Every row sees keys 0 .. write + q - 1. Returns tokens [R,q], owned by the backend and overwritten by the
        next call of the same q: copy what you keep.
        """
        ...

    def logits(self, ids: Int, write: int) -> Float:
        """The same call for its logits [B,q,V] (guided, before temperature); for checks, not for speed."""
        ...

    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] of ``tokens`` [B,N] in sequence order. A fresh array."""
        ...

    def whole(self, batch: Batch, class_ids: Int, noise: Float, decode: bool) -> Whole | None:
        """All calls of a batch at once: ``class_ids`` [R] of the first call, ``noise`` [B,N] in [0,1).

        Returns tokens [B,N] and images [B,H,W,3] (None without ``decode``), or None where the backend runs call by call.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; it cannot be used afterwards."""
        ...
