"""Photos and other images as input of the model: opened, fitted to its size, and which of their tokens stay."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from par_runtime.errors import RequestError

Fit = Literal["crop", "stretch"]
SIDES = ("left", "right", "top", "bottom", "center", "border", "all", "none")
REGION = f"expected one of {', '.join(SIDES)}, a box X0,Y0,X1,Y1 in pixels, or a mask image (white is the region)"


def open_image(path: Path, *, mode: str = "RGB") -> Image.Image:
    """The image at ``path``, upright; transparent places become white. Raises RequestError, OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)  # phones store the camera's angle beside the pixels
                if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them instead of scaling
                    image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
                if mode == "RGB" and ("A" in image.getbands() or "transparency" in image.info):
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                return image.convert(mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RequestError(
            f"{path}: not an image that can be read ({error}); expected PNG, JPEG, WebP or the like"
        ) from error
    except OSError as error:
        if error.filename:
            raise
        raise RequestError(f"{path}: not an image that can be read ({error}); it may be truncated") from error


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


def parse_box(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """``X0,Y0,X1,Y1`` in pixels, checked against ``size`` (H, W). Raises RequestError."""
    height, width = size
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"box {text!r}: expected four whole numbers X0,Y0,X1,Y1") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RequestError(
            f"box {text!r}: expected 0 <= X0 < X1 <= {width} and 0 <= Y0 < Y1 <= {height}, the pixels of this model's "
            "images"
        )
    return x0, y0, x1, y1


def region_mask(text: str, size: tuple[int, int], fit: Fit = "crop") -> NDArray[np.bool_]:
    """The pixels [H,W] that ``text`` names: a side (a half), the middle, its border, a box, or a mask image.

    A mask image is fitted as the photo is, so that a mask drawn over the photo marks the same part of it. Raises
    RequestError, OSError.
    """
    height, width = size
    mask = np.zeros(size, bool)
    middle = (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4))
    if text == "left":
        mask[:, : width // 2] = True
    elif text == "right":
        mask[:, width // 2 :] = True
    elif text == "top":
        mask[: height // 2] = True
    elif text == "bottom":
        mask[height // 2 :] = True
    elif text in ("center", "border"):
        mask[middle] = True
        if text == "border":
            mask[:] = ~mask
    elif text == "all":
        mask[:] = True
    elif text == "none":
        pass
    elif text.count(",") == 3:
        x0, y0, x1, y1 = parse_box(text, size)
        mask[y0:y1, x0:x1] = True
    else:
        if not Path(text).exists():
            raise RequestError(f"region {text!r}: {REGION}")
        mask[fit_image(open_image(Path(text), mode="L"), size, fit) >= 128] = True
    return mask


def kept_tokens(kept: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tokens [h,w] of ``grid`` stay, where the pixels ``kept`` [H,W] stay: a token stays if all its pixels do."""
    h, w = grid
    height, width = kept.shape
    cells: NDArray[np.bool_] = np.asarray(kept.reshape(h, height // h, w, width // w).all((1, 3)))
    return cells
