"""PNG files with everything that is needed to make them again: a sheet of images, and their recipe in an iTXt chunk."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from par_runtime.arguments import as_index, given
from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.images.opening import MOST_PIXELS, opened
from par_runtime.images.pillow import ready
from par_runtime.images.recipe import MOST_SCALE, Recipe, entry, parse, pixel_hash
from par_runtime.system import write_beside

__all__ = [
    "Recipe",
    "check_scale",
    "check_sheet",
    "enlarged",
    "read",
    "read_any",
    "same_pixels",
    "sheet",
    "sheet_image",
    "sheet_size",
    "write_pixels",
]

CHUNK = "parvis"
MOST_SIDE = 65535  #: pixels; other programs open no wider or higher images


def check_sheet(count: int, columns: int, size: tuple[int, int]) -> None:
    """Raise RequestError where a sheet of ``count`` images of ``size`` (H, W) in ``columns`` is no PNG to be opened.

    To be called before any image is made.
    """
    index = as_index(columns)
    if index is None or index < 1:
        raise RequestError(f"columns {given(columns)}: expected a whole number, 1 or more")
    height, width = sheet_size(count, index, size)
    if max(height, width) > MOST_SIDE or height * width > MOST_PIXELS:
        each = size[0] * size[1]
        fits = min(MOST_PIXELS // each, (MOST_SIDE // size[0]) * (MOST_SIDE // size[1]))
        raise RequestError(
            f"a sheet of {count} images in {shown(index)} columns has {shown(width)}x{shown(height)} pixels; "
            f"expected at most {MOST_SIDE} on a side and {MOST_PIXELS} in all, which other programs can open (about "
            f"{fits} images): give other columns, fewer images, or one file each (--out-dir)"
        )


def sheet_size(count: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of a sheet of ``count`` images of ``size`` (H, W)."""
    return -(-count // columns) * size[0], columns * size[1]


def sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay ``images`` [B,H,W,3] out in rows of ``columns``: [rows*H, columns*W, 3], empty places white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, height, width, 3), 255, np.uint8)
    np.copyto(canvas[:count], images, casting="no")  # floats would become black, or wrap
    return canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def check_scale(scale: int) -> None:
    """Raise RequestError where ``scale``, by which a sheet is enlarged, is no whole number from 1 to 64."""
    index = as_index(scale)
    if index is None or not 1 <= index <= MOST_SCALE:
        raise RequestError(f"scale {given(scale)}: expected a whole number from 1 to {MOST_SCALE}")


def enlarged(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """``pixels`` [H,W,3] with each as a square of ``scale`` pixels a side: [H*scale, W*scale, 3]."""
    return pixels.repeat(scale, 0).repeat(scale, 1)


def _reduced(recipe: Recipe, image: Image.Image) -> tuple[Recipe, Image.Image]:
    """The recipe and the sheet without its enlargement.

    Where a square is not of one colour, somebody changed it: it becomes its mean, and the recipe loses the hash of its
    image. An image whose size is no multiple of the scale was resized, and stays as it is.
    """
    scale, count = recipe.scale, len(recipe)
    height, width = image.height // scale, image.width // scale
    if scale == 1 or (width * scale, height * scale) != image.size:
        return recipe, image
    pixels = np.asarray(image)
    small = pixels[::scale, ::scale]
    of_one_colour = (enlarged(small, scale) == pixels).reshape(height, scale, width, scale, 3).all((1, 3, 4))
    if of_one_colour.all():
        return recipe, Image.fromarray(np.ascontiguousarray(small))
    if recipe.pixel_hashes is not None and height >= -(-count // recipe.columns) and width >= recipe.columns:
        whole = [sheet_image(of_one_colour, recipe.columns, count, i).all() for i in range(count)]
        hashes = [known if same else "" for known, same in zip(recipe.pixel_hashes, whole, strict=True)]
        recipe = replace(recipe, pixel_hashes=hashes)
    return recipe, image.reduce(scale)


def sheet_image(pixels: NDArray[Any], columns: int, count: int, index: int) -> NDArray[Any]:
    """Image ``index`` [H,W,3] of a sheet's ``pixels``, which holds ``count`` images in rows of ``columns``."""
    row, column = divmod(index, columns)
    height, width = pixels.shape[0] // -(-count // columns), pixels.shape[1] // columns
    return pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]


def same_pixels(recipe: Recipe, pixels: NDArray[np.uint8], size: tuple[int, int]) -> list[bool] | None:
    """Which images of a sheet's ``pixels`` [H,W,3] are as they were written; each is of ``size`` (H, W).

    None where the sheet has another size than it was written with, or the file is older and has no hashes.
    """
    if recipe.pixel_hashes is None or pixels.shape[:2] != sheet_size(len(recipe), recipe.columns, size):
        return None
    each = (sheet_image(pixels, recipe.columns, len(recipe), i) for i in range(len(recipe)))
    return [pixel_hash(image) == wanted for image, wanted in zip(each, recipe.pixel_hashes, strict=True)]


def content(recipe: Recipe, images: NDArray[np.uint8]) -> bytes:
    """``images`` [B,H,W,3] as one PNG with their recipe, in rows of its columns. Raises RequestError."""
    check_sheet(len(images), recipe.columns, (images.shape[1] * recipe.scale, images.shape[2] * recipe.scale))
    recipe = replace(recipe, pixel_hashes=[pixel_hash(image) for image in images])
    chunk = PngImagePlugin.PngInfo()
    # Not compressed: Pillow refuses to read compressed text of more than 1 MB, which is 900 images of 576 tokens.
    chunk.add_itxt(CHUNK, json.dumps(entry(recipe)))
    return encoded(enlarged(sheet(images, recipe.columns), recipe.scale), chunk)


def write_pixels(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write ``pixels`` [H,W,3] as a PNG, beside ``path`` and renamed. Raises OSError."""
    data = encoded(pixels)
    write_beside(path, lambda part: part.write_bytes(data))


def encoded(pixels: NDArray[np.uint8], chunk: PngImagePlugin.PngInfo | None = None) -> bytes:
    """``pixels`` [H,W,3] as a PNG."""
    ready()
    out = io.BytesIO()  # not into a file: Pillow would hide why it could not be written ("encoder error -2")
    Image.fromarray(pixels).save(out, format="PNG", pnginfo=chunk)
    return out.getvalue()


def read(path: Path) -> tuple[Recipe, NDArray[np.uint8]]:
    """The recipe and the pixels [H,W,3] of a PNG that parvis wrote. Raises RequestError, OSError."""
    return with_recipe(path, *read_any(path))


def with_recipe(path: Path, recipe: Recipe | None, image: Image.Image) -> tuple[Recipe, NDArray[np.uint8]]:
    """What :func:`read` gives, of what :func:`read_any` gave. Raises RequestError where there is no recipe."""
    if recipe is None:
        raise RequestError(
            f"{path}: has no 'parvis' entry; only a PNG of 'parvis generate' or 'edit' can be made again, and "
            "only while no other program has saved it"
        )
    return recipe, np.asarray(image)


def read_any(path: Path) -> tuple[Recipe | None, Image.Image]:
    """Any image (RGB, upright, white where transparent), and its recipe if parvis wrote it.

    A sheet that was written enlarged has its own size again. Raises RequestError, OSError.
    """
    picture = opened(path)
    text = picture.text.get(CHUNK)
    if text is None:
        return None, picture.on_white()
    return _reduced(parse(str(text), str(path)), picture.on_white())
