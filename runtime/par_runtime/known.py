"""Tokens that are given instead of drawn: for inpainting, outpainting, and the likelihood of an image.

The calls are the same as without known tokens; a known token replaces the one that was drawn at its position. Tokens
that come earlier in the order are drawn without seeing it, because the model fixes the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from par_runtime.arguments import whole
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import EngineError, RequestError
from par_runtime.request import array


@dataclass(frozen=True, eq=False)
class Known:
    """``tokens`` [B,N] are known at the positions where ``keep`` [B,N] is true; both in sequence order."""

    keep: NDArray[np.bool_]
    tokens: Int

    def part(self, which: slice) -> Known:
        """The known tokens of the images ``which``."""
        return Known(self.keep[which], self.tokens[which])

    def put(self, tokens: Int, positions: slice) -> None:
        """Overwrite the drawn ``tokens`` [B,N] with the known ones, at those of ``positions`` that are known."""
        keep, known = self.keep[:, positions], self.tokens[:, positions]
        tokens[:, positions] = np.where(keep, known, tokens[:, positions])


def known_tokens(bundle: Bundle, images: int, keep: ArrayLike | None, tokens: ArrayLike | None) -> Known | None:
    """Check ``keep``, bool [H,W] or [B,H,W] (with T for video), and ``tokens``, [N] or [B,N] in sequence order.

    None where neither is given. Raises RequestError.
    """
    if keep is None and tokens is None:
        return None
    if keep is None or tokens is None:
        raise RequestError(
            "keep and tokens belong together; give both (which places of the grid are known, and the tokens)"
        )
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


def sequence_array(bundle: Bundle, values: ArrayLike) -> NDArray[Any]:
    """``values`` as an array [B,N] with an entry per token. Raises RequestError."""
    out = array("tokens", values)
    if out.ndim != 2 or out.shape[1] != bundle.n_tokens:
        raise RequestError(f"tokens have shape {out.shape}; expected [B,{bundle.n_tokens}] in sequence order")
    return out


def raster_array(bundle: Bundle, values: ArrayLike) -> NDArray[Any]:
    """``values`` [B,N] in sequence order, one per token, put into raster order. Raises RequestError."""
    given = sequence_array(bundle, values)
    out = np.empty_like(given)
    out[:, list(bundle.order)] = given
    return out


def sequence_tokens(bundle: Bundle, tokens: ArrayLike, beginning: bool = False) -> Int:
    """``tokens`` [B,N] as int64; with ``beginning`` also those of the first f latent frames of clips, [B,f*h*w].

    Raises RequestError.
    """
    begun = array("tokens", tokens)
    if beginning and begun.ndim == 2 and _is_beginning(bundle, begun):
        _check_ids(bundle, begun)
        return begun.astype(np.int64)
    if beginning and bundle.video and begun.ndim == 2 and begun.shape[1] != bundle.n_tokens:
        raise RequestError(f"tokens have shape {begun.shape}; expected [B,{bundle.n_tokens}] {_or_first(bundle)}")
    out = sequence_array(bundle, tokens)
    return given_tokens(bundle, len(out), out)


def decodable_tokens(bundle: Bundle, tokens: ArrayLike) -> Int:
    """``tokens`` [N] or [B,N] as [B,N] int64. Of clips they may be those of the first f latent frames, [B,f*h*w].

    Raises RequestError.
    """
    raw = array("tokens", tokens)
    given = np.atleast_2d(raw)
    if bundle.video and given.ndim == 2:
        if (not raw.size and raw.ndim < 2) or raw.dtype.kind not in "iu":
            n, kind = bundle.n_tokens, f"shape {raw.shape} and type {raw.dtype}"
            raise RequestError(f"tokens have {kind}; expected integers [{n}] or [B,{n}] {_or_first(bundle)}")
        return sequence_tokens(bundle, given, beginning=True)
    return given_tokens(bundle, len(given), tokens)


def _or_first(bundle: Bundle) -> str:
    """How the tokens of clips may lie, in an error's words."""
    size = bundle.frame_tokens
    return f"in sequence order, or the first {size}, {2 * size}, ... of these: those of the first latent frames"


def _is_beginning(bundle: Bundle, tokens: NDArray[Any]) -> bool:
    """Whether ``tokens`` [B,K] are as many as those of some of the latent frames, but not of all."""
    count = tokens.shape[1]
    return bundle.video and 0 < count < bundle.n_tokens and count % bundle.frame_tokens == 0


def kept_frames(bundle: Bundle, frames: int | None) -> NDArray[np.bool_] | None:
    """Which latent frames [t] lie within the first ``frames`` frames of a clip; None where ``frames`` is None.

    Raises RequestError.
    """
    if frames is None:
        return None
    if not bundle.video:
        raise RequestError(f"keep_frames {frames}: {bundle.path} makes images, not clips; leave it out")
    frames = whole("keep_frames", frames, 1, bundle.frames, ", the frames of a clip")
    ends = [bundle.frames_of(f + 1) for f in range(bundle.latent_frames)]
    return np.array([end <= frames for end in ends])


def drawn_tokens(bundle: Bundle, backend: str, tokens: Int, first: int = 0) -> None:
    """Check ``tokens`` [B,q] that ``backend`` drew at the positions from ``first`` on, before they are decoded.

    Raises EngineError where one is no code: not the request is at fault then, but what computed it. Tokens alone
    (``decode=False``) are given as they are: ``parvis verify`` judges them.
    """
    wrong = (tokens < 0) | (tokens >= bundle.vocab_size)
    if wrong.any():
        image, at = (int(i) for i in np.argwhere(wrong)[0])
        raise EngineError(
            f"{bundle.path}: {backend} gives token {tokens[image, at]} at position {first + at}; expected "
            f"0..{bundle.vocab_size - 1}: it computes wrongly. Build the engine again, or use another device"
        )


def given_tokens(bundle: Bundle, images: int, tokens: ArrayLike) -> Int:
    """``tokens`` [N] or [B,N] as [B,N] int64. Raises RequestError."""
    given = array("tokens", tokens)
    n = bundle.n_tokens
    if given.shape not in ((n,), (images, n)) or given.dtype.kind not in "iu":
        raise RequestError(
            f"tokens have shape {given.shape} and type {given.dtype}; expected integers [{n}] or [{images},{n}] in "
            "sequence order"
        )
    _check_ids(bundle, given)
    return np.broadcast_to(given, (images, n)).astype(np.int64)


def _check_ids(bundle: Bundle, given: NDArray[Any]) -> None:
    """Raise RequestError unless ``given`` are integers, and ids of codes."""
    if given.dtype.kind not in "iu":
        raise RequestError(f"tokens have type {given.dtype}; expected integers")
    if given.size and not 0 <= given.min() <= given.max() < bundle.vocab_size:
        raise RequestError(f"tokens lie in {given.min()}..{given.max()}; expected 0..{bundle.vocab_size - 1}")
