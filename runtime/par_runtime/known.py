"""Tokens that are given instead of drawn: for inpainting, outpainting, and the likelihood of an image.

A known token is fed where a drawn one would be; the calls are the same ones. What comes before it in the order did
not see it: the order is fixed by the model, not by the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.request import array


@dataclass(frozen=True)
class Known:
    """``keep`` [B,N]: positions whose token is ``tokens`` [B,N], both in sequence order."""

    keep: NDArray[np.bool_]
    tokens: Int

    def part(self, which: slice) -> Known:
        return Known(self.keep[which], self.tokens[which])

    def put(self, tokens: Int, here: slice) -> None:
        """Overwrite drawn ``tokens`` [B,N] at positions ``here`` where they are known."""
        tokens[:, here] = np.where(self.keep[:, here], self.tokens[:, here], tokens[:, here])


def known_tokens(bundle: Bundle, images: int, keep: ArrayLike | None, tokens: ArrayLike | None) -> Known | None:
    """Check ``keep``, bool [H,W] or [B,H,W] (with T for video), and ``tokens``, [N] or [B,N] in sequence order.

    None where neither is given. Raises RequestError.
    """
    if keep is None and tokens is None:
        return None
    if keep is None or tokens is None:
        raise RequestError("keep and tokens belong together: which places of the grid are known, and the tokens")
    t, h, w = bundle.grid
    grid = (h, w) if t == 1 else (t, h, w)
    mask = array("keep", keep)
    if mask.dtype != np.bool_ or mask.shape not in (grid, (images, *grid)):
        raise RequestError(
            f"keep has shape {mask.shape} and type {mask.dtype}; expected bool of the grid's shape {grid}, or "
            f"{(images, *grid)}"
        )
    places = np.broadcast_to(mask, (images, *grid)).reshape(images, -1)[:, list(bundle.order)]
    return Known(places, given_tokens(bundle, images, tokens))


def given_tokens(bundle: Bundle, images: int, tokens: ArrayLike) -> Int:
    """``tokens`` [N] or [B,N] as [B,N] int64. Raises RequestError."""
    given = array("tokens", tokens)
    n = bundle.n_tokens
    if given.shape not in ((n,), (images, n)) or given.dtype.kind not in "iu":
        raise RequestError(
            f"tokens have shape {given.shape} and type {given.dtype}; expected integers [{n}] or [{images},{n}] in "
            "sequence order"
        )
    if given.size and not 0 <= given.min() <= given.max() < bundle.vocab_size:
        raise RequestError(f"tokens lie in {given.min()}..{given.max()}; expected 0..{bundle.vocab_size - 1}")
    return np.broadcast_to(given, (images, n)).astype(np.int64)
