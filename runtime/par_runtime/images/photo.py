"""Photos and other images as input of the model: fitted to its size, or placed in a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from par_runtime.arguments import check_unmasked
from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.images.opening import open_image
from par_runtime.request import MOST_OF_A_REQUEST

Fit = Literal["crop", "stretch"]
FITS = ("crop", "stretch")
#: Pictures as callers have them: a path, a PIL image, uint8 [H,W,3], several of these, or uint8 [B,H,W,3].
Pictures = Any


def to_pixels(source: Pictures, size: tuple[int, int], fit: Fit = "crop") -> NDArray[np.uint8]:
    """``source`` as uint8 [B,H,W,3] of ``size`` (H, W).

    A path (str or Path), a PIL image, an array uint8 [H,W,3] or [B,H,W,3], or several of the first three. What has
    another size is fitted as in :func:`fit_image`; photos are turned upright, and put on white where transparent.
    Raises RequestError, OSError.
    """
    check_fit(fit)
    if _is_one(source):
        return _one(source, size, fit)[None]
    if not hasattr(source, "__array__"):
        if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray, dict)) or hasattr(source, "read"):
            raise _no_picture(shown(source), size)
        each = list(islice(source, MOST_OF_A_REQUEST + 1))
        if len(each) > MOST_OF_A_REQUEST:
            raise RequestError(f"more than {MOST_OF_A_REQUEST} pictures; give fewer at a time")
        if all(_is_one(one) for one in each):
            return np.stack([_one(one, size, fit) for one in each]) if each else np.zeros((0, *size, 3), np.uint8)
        source = _as_array(each, size)
    batch = _as_array(source, size)
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
        raise _no_picture(f"shape {batch.shape} and type {batch.dtype}", size)
    if len(batch) > MOST_OF_A_REQUEST:
        raise RequestError(f"more than {MOST_OF_A_REQUEST} pictures; give fewer at a time")
    if batch.shape[1:3] == size:
        return batch
    return np.stack([_one(one, size, fit) for one in batch]) if len(batch) else np.zeros((0, *size, 3), np.uint8)


def check_fit(fit: object) -> None:
    """Raise RequestError where ``fit`` is none of :data:`FITS`."""
    if not isinstance(fit, str) or fit not in FITS:
        raise RequestError(f"fit {shown(fit)}: expected {' or '.join(FITS)}")


def _is_one(source: Pictures) -> bool:
    """Whether ``source`` is one picture: a path, a PIL image, or an array of three axes."""
    return isinstance(source, (str, os.PathLike, Image.Image)) or (
        hasattr(source, "__array__") and getattr(source, "ndim", 0) == 3
    )


def _one(source: Pictures, size: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """One picture as uint8 [H,W,3]."""
    if isinstance(source, (str, os.PathLike, Image.Image)):
        return fit_image(open_image(source), size, fit)
    pixels = _as_array(source, size)
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise _no_picture(f"shape {pixels.shape} and type {pixels.dtype}", size)
    return pixels if pixels.shape[:2] == size else fit_image(Image.fromarray(pixels), size, fit)


def _as_array(source: Pictures, size: tuple[int, int]) -> NDArray[Any]:
    check_unmasked("images", source)
    try:
        return np.asarray(source)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: tensors of a GPU
        raise _no_picture(shown(str(error)), size) from error


def _no_picture(given: str, size: tuple[int, int]) -> RequestError:
    return RequestError(
        f"images have {given}; expected uint8 [{size[0]}, {size[1]}, 3], or a batch of such images; or of any size: "
        "paths, PIL images (of bytes: PIL.Image.open(io.BytesIO(data))) or arrays uint8 [H,W,3], one or a list"
    )


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> NDArray[np.uint8]:
    """``image`` as uint8 [H,W,3] ([H,W] of a mask) of ``size`` (H, W).

    ``fit`` "crop" takes the largest middle part of that shape, "stretch" all of the image.
    """
    height, width = size
    if image.size == (width, height):
        return np.array(image)
    # No interpolation of a mask, so that it stays black and white.
    how = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return np.array(ImageOps.fit(image, (width, height), how) if fit == "crop" else image.resize((width, height), how))


def fitted_box(
    box: tuple[int, int, int, int], photo: tuple[int, int], size: tuple[int, int], fit: Fit = "crop"
) -> tuple[int, int, int, int] | None:
    """Where a ``box`` (x0, y0, x1, y1) of a photo (width, height) lies after :func:`fit_image` to ``size`` (H, W).

    Rounded outwards, and clipped to what is left of the photo; None where nothing of the box is left.
    """
    out: list[int] = []
    for axis in (0, 1):
        length, pixels = photo[axis], (size[1], size[0])[axis]
        other, other_pixels = photo[1 - axis], (size[1], size[0])[1 - axis]
        # Whole numbers: what stays in pixels of the photo, times other_pixels; and twice what is cut off on one side.
        whole = length * other_pixels
        part = min(whole, other * pixels) if fit == "crop" else whole
        offset = whole - part
        low, high = ((2 * edge * other_pixels - offset) * pixels for edge in (box[axis], box[axis + 2]))
        out += [max(0, low // (2 * part)), min(pixels, -(-high // (2 * part)))]
    x0, x1, y0, y1 = out
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def place_image(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """``image`` resized into ``box`` (x0, y0, x1, y1) of a canvas of ``size`` (H, W).

    Returns the canvas, uint8 [H,W,3], and which of its pixels are in the box, bool [H,W]. Around the box the canvas
    repeats the image's edge, because that changes the encoding of the image inside the least.
    """
    x0, y0, x1, y1 = box
    height, width = size
    inner = fit_image(image, (y1 - y0, x1 - x0))
    canvas = np.pad(inner, ((y0, height - y1), (x0, width - x1), (0, 0)), mode="edge")
    inside = np.zeros(size, bool)
    inside[y0:y1, x0:x1] = True
    return canvas, inside
