"""Photos and other images as input of the model: fitted to its size, or placed in a part of it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Fit = Literal["crop", "stretch"]


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
