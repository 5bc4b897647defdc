"""Pictures opened: any file or PIL image becomes eight bits of red, green and blue, upright, with its alpha apart.

A file may have been made to do harm, so what it claims is checked before it is decoded. No picture becomes black, or
another picture, in silence: values whose meaning is unknown are refused.
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from par_runtime.arguments import check_unmasked
from par_runtime.checked import open_regular, shown, shown_path, why_not_regular
from par_runtime.errors import RequestError
from par_runtime.images.pillow import quiet, ready
from par_runtime.reading import REMEDIES, advised
from par_runtime.system import explain

#: The most pixels of a picture that is read or written: what Pillow opens without a warning. Takes up to 0.7 GB.
MOST_PIXELS = 89_478_485
#: A picture as a caller has it: a path, a PIL image, or an array uint8 [H,W,3].
Picture: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
MOST_FILE_BYTES = 2**30
#: What says that a path was wrong, not that the machine is.
WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
#: Readers that are kept well, and run nothing (Pillow gives EPS files to Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "TGA")
EXPECTED = "expected PNG, JPEG, WebP, TIFF or the like"
TIFF_BITS_PER_SAMPLE = 258
BLACK_POINT_COMPENSATION = 0x2000  #: of LittleCMS; ImageCms has a name for it from Pillow 10.3 on
SRGB_GAMMA = 0.45455  #: the gAMA entry of a PNG whose values are those of a screen


@dataclass(frozen=True)
class Opened:
    """A picture: ``color`` (RGB), ``alpha`` (L, None where all of it is opaque), and the texts of a PNG."""

    color: Image.Image
    alpha: Image.Image | None = None
    text: Mapping[str, str] = field(default_factory=dict)

    def on_white(self) -> Image.Image:
        """The picture, RGB, with white where it is transparent."""
        if self.alpha is None:
            return self.color
        out = Image.new("RGB", self.color.size)
        for box in _strips(out):
            part = self.color.crop(box)
            part.putalpha(self.alpha.crop(box))
            white = Image.new("RGBA", part.size, "white")
            out.paste(Image.alpha_composite(white, part).convert("RGB"), box)
        return out


def open_image(source: Picture) -> Image.Image:
    """``source`` as RGB: upright, white where transparent. Errors as :func:`opened`."""
    return opened(source).on_white()


def opened(source: Picture) -> Opened:
    """Open a path, or take a PIL image or uint8 [H,W,3]; of several frames the first (of a PIL image: its current).

    Upright by its EXIF entry, in sRGB where it has a usable colour profile. Raises RequestError, also where there is no
    such file or it may not be read; OSError where the system cannot read (a broken disk, too many open files).
    """
    if isinstance(source, Image.Image):
        return _guarded("the PIL image", source, own=False)
    check_unmasked("picture", source)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
        return _guarded("the array", Image.fromarray(source), own=False)
    if not isinstance(source, (str, os.PathLike)):
        raise RequestError(
            f"picture {shown(source)}: expected a path, a PIL image (of bytes: PIL.Image.open(io.BytesIO(data))), or "
            "an array uint8 [H,W,3]"
        )
    path = Path(source)
    why = why_not_regular(path)
    if why is not None and why != "missing":
        raise RequestError(advised(f"{shown_path(path)}: {why}", f"give the path of a picture, {EXPECTED}"))
    with _readable(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size == 0:
            raise RequestError(f"{path}: not an image that can be read (it is empty); {EXPECTED}")
        if size > MOST_FILE_BYTES:
            raise RequestError(f"{path}: {size} bytes; expected a picture of at most {MOST_FILE_BYTES}")
        return _guarded(str(path), file, own=True)


def _readable(path: Path) -> BinaryIO:
    """``path``, opened. A path that cannot be right is a bad request, as every other argument."""
    try:
        return open_regular(path)
    except OSError as error:
        if error.errno not in WRONG_PATH:
            raise
        raise RequestError(explain(error)) from error


def _guarded(name: str, source: Any, own: bool) -> Opened:
    """What ``source`` (an open file, or a PIL image) holds; every fault of it as a RequestError."""
    try:
        ready()
        with quiet():
            if not own:
                return _layers(name, source)
            with Image.open(source, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                return _layers(name, image, own=True)
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"{name}: not an image that can be read; {EXPECTED}") from error
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name}: {_too_large()}") from error
    except MemoryError as error:
        raise RequestError(f"{name}: not enough memory for this image; give a smaller one") from error
    except Exception as error:  # readers of broken files raise nearly anything
        if isinstance(error, OSError) and error.errno in REMEDIES:  # of the system: also Pillow opens its readers here
            raise OSError(error.errno, error.strerror, error.filename or name) from error
        why = shown(str(error), 120).strip("'\"") or type(error).__name__
        raise RequestError(f"{name}: not an image that can be read ({why}); it may be truncated or damaged") from error


def _too_large(size: str = "") -> str:
    return f"{size}too many pixels; expected at most {MOST_PIXELS} in all: give a smaller picture"


def _layers(name: str, image: Image.Image, own: bool = False) -> Opened:
    """``image`` in RGB and alpha. An image of our ``own`` may be changed in place."""
    if image.width * image.height > MOST_PIXELS and own:
        image.draft(None, (image.width // 2, image.height // 2))  # a large JPEG is decoded at half its size or less
    if image.width * image.height > MOST_PIXELS:
        raise RequestError(f"{name}: {_too_large(f'{image.width}x{image.height} is ')}")
    if 0 in image.size:
        raise RequestError(f"{name}: {image.width}x{image.height} pixels; expected at least one")
    stored_in_16_bits = ";16" in str([getattr(t, "args", t) for t in getattr(image, "tile", [])])
    image.load()
    info, text = dict(image.info), _texts(image)
    bits, is_png = _tiff_bits(image), image.format == "PNG"
    if image.format != "TIFF":  # these are turned by loading them; older versions of Pillow would turn them twice
        with suppress(Exception):  # a broken EXIF entry says nothing about the picture
            # Phones store the camera's angle beside the pixels.
            if own:
                ImageOps.exif_transpose(image, in_place=True)
            else:
                image = ImageOps.exif_transpose(image)
    alpha = _alpha(image, info)
    if image.mode[:1] in ("I", "F"):
        image = _eight_bits(name, image, bits, is_png)
    elif stored_in_16_bits and not np.any(image.getextrema()) and len(image.getbands()) > 1:
        raise RequestError(
            f"{name}: all its 16-bit values lie below 256, so it is black; convert it to 8 bits per channel"
        )
    color = _in_srgb(_without_alpha(image), info)
    if alpha is not None and extrema(alpha)[0] == 255:
        alpha = None
    return Opened(color, alpha, text)


def _texts(image: Image.Image) -> dict[str, str]:
    """The texts of a PNG. Of an animated one those before its first frame: for others Pillow decodes all frames."""
    if image.format == "PNG" and getattr(image, "is_animated", False):
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    return dict(getattr(image, "text", {}))


# -- alpha ------------------------------------------------------------------------------------------------------------


def _alpha(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image | None:
    """The alpha channel (L) of ``image``, None where its mode knows none."""
    mode, clear = image.mode, info.get("transparency")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.getchannel(len(image.getbands()) - 1)
    if mode.startswith("I") and isinstance(clear, int):  # one grey value of a PNG with 16 bits
        return Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
    if mode == "P" and (clear is not None or (image.palette is not None and image.palette.mode == "RGBA")):
        return image.convert("RGBA").getchannel("A")
    if mode in ("1", "L", "RGB") and clear is not None:
        return image.convert("RGBA").getchannel("A")
    return None


def _without_alpha(image: Image.Image) -> Image.Image:
    """``image`` with nothing but its colours: L, RGB, or a mode that converts to RGB."""
    if image.mode == "La":  # grey, multiplied by its alpha
        image = image.convert("LA")
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if image.mode == "LA":
        return image.getchannel(0)
    if image.mode in ("P", "PA", "RGBA", "RGBX", "1"):
        return image.convert("RGB")
    return image


# -- values of more than eight bits -----------------------------------------------------------------------------------


def _tiff_bits(image: Image.Image) -> int | None:
    """Bits per value that a TIFF states, None where there is no such statement."""
    tags = getattr(image, "tag_v2", None)
    stated = None if tags is None else tags.get(TIFF_BITS_PER_SAMPLE)
    return stated[0] if isinstance(stated, tuple) and stated and isinstance(stated[0], int) else None


def _eight_bits(name: str, image: Image.Image, bits: int | None, is_png: bool) -> Image.Image:
    """A grey image of 16 or 32 bits, or of floats, in eight (L). Raises RequestError where its white is unknown."""
    ends = [(part.min(), part.max()) for part in (np.asarray(image.crop(box)) for box in _strips(image))]
    low, high = float(np.min(ends)), float(np.max(ends))  # NaN where one value is
    fix = "convert it to 8 bits per channel"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RequestError(f"{name}: holds values that are not finite (NaN or infinity); {fix}")
    if bits is not None and 8 < bits < 16 and low >= 0 and high < 2**bits:  # for instance 12 bits of a camera
        return _scaled(image, 2**bits - 1)
    # What other programs write into wide types is 0..1, 0..255 or 0..65535; a sharpened picture goes a little beyond.
    # Where the picture would be nearly black, its white is taken to be unknown. A PNG says what its white is.
    if image.mode == "F":
        room, scales = 0.05, [(1.0, 0.0), (255.0, 16.0), (65535.0, 4096.0)]
    else:
        room, scales = 0.0, [(255.0, 0.0), (65535.0, 256.0 if is_png else 4096.0)]
    for white, darkest in scales:
        if -room * white <= low and darkest <= high <= white + room * white:
            return _scaled(image, white)
    expected = "0..1, 0..255 or 0..65535" if image.mode == "F" else "0..255 or 0..65535"
    raise RequestError(
        f"{name}: its values lie in {low:g}..{high:g}, so what is white is not known; expected {expected}: {fix}"
    )


def _scaled(image: Image.Image, white: float) -> Image.Image:
    """A grey ``image`` of wide values in eight bits (L), with ``white`` as 255."""
    out = Image.new("L", image.size)
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        if white == 65535 and values.dtype.kind in "iu":
            scaled = values.astype(np.int64) >> 8
        else:
            scaled = np.rint(values.astype(np.float32) * np.float32(255 / white)).clip(0, 255)
        out.paste(Image.fromarray(scaled.astype(np.uint8)), box)
    return out


def _strips(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes of a million pixels that cover ``image``: all of a large picture in wide types takes much memory."""
    step = max(1, 2**20 // image.width)
    return [(0, top, image.width, min(top + step, image.height)) for top in range(0, image.height, step)]


# -- colours ----------------------------------------------------------------------------------------------------------


def _in_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """``image`` as RGB for a screen. Its colour profile is obeyed; one that is broken or does not fit is ignored."""
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if isinstance(profile, bytes) and profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(source.profile.xcolor_space.strip())
            # Most photos have this profile, and converting them to it would round for nothing.
            if space == image.mode and "srgb" not in (source.profile.profile_description or "").lower():
                converted = ImageCms.profileToProfile(
                    image,
                    source,
                    ImageCms.createProfile("sRGB"),
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    outputMode="RGB",
                    flags=BLACK_POINT_COMPENSATION,  # type: ignore[arg-type]
                )
                assert converted is not None  # as it is not done in place
                return converted
    elif isinstance(gamma, float) and 0.01 < gamma < 10 and "srgb" not in info and abs(gamma / SRGB_GAMMA - 1) > 0.05:
        table = [round(255 * (v / 255) ** (SRGB_GAMMA / gamma)) for v in range(256)]
        image = image.convert("RGB")
        return image.point(table * 3)
    return image if image.mode == "RGB" else image.convert("RGB")


def extrema(image: Image.Image) -> tuple[int, int]:
    """The least and the greatest value of an image of one channel (L)."""
    low, high = image.getextrema()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high
