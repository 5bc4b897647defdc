"""Parts of an image: named, a box, or drawn as a mask; and which tokens lie in them.

What a mask image means (``mask_from``):

- without transparency, "brightness": white is the region, grey edges count from the middle on;
- strokes that are white and opaque on a transparent layer, "alpha": what is opaque is the region;
- a picture with a transparent hole, "inverse-alpha": what is transparent is the region.

"auto" takes the one that fits, and refuses a mask that could mean two of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.arguments import check_unmasked
from par_runtime.checked import shown
from par_runtime.dtypes import ByValue
from par_runtime.errors import RequestError
from par_runtime.images.opening import Opened, Picture, extrema, open_image, opened
from par_runtime.images.photo import Fit, check_fit, fit_image, fitted_box

#: What :func:`region` takes.
Named: TypeAlias = str | Path | Image.Image | NDArray[np.bool_]
MaskFrom = Literal["auto", "brightness", "alpha", "inverse-alpha"]
MASK_FROM = ("auto", "brightness", "alpha", "inverse-alpha")
SIDES = ("left", "right", "top", "bottom", "center", "border", "all", "none")
REGION = f"expected one of {', '.join(SIDES)}, a box X0,Y0,X1,Y1 in pixels, or a mask image (white is the region)"
GIVE = "give mask_from= (--mask-from) brightness, alpha or inverse-alpha"
SPECKS = 0.001  #: the part of a mask's pixels that may be odd: what JPEG leaves at edges
WHITE = 200  #: what counts as painted white
FLAT = 16  #: a picture has more colours than this (of 32 levels each); what is painted with a few brushes has fewer


@dataclass(frozen=True, eq=False)
class Region(ByValue):
    """The pixels [H,W] of a region, and for a mask image what of it was taken."""

    pixels: NDArray[np.bool_]
    mask_from: str | None = None


@dataclass(frozen=True)
class Beside:
    """The photo that a mask was drawn over: its size (width, height), and enough of its pixels to know it by."""

    size: tuple[int, int]
    small: Image.Image
    sheet: tuple[int, int] | None = None  #: the size of the whole sheet, where the photo is one of several images
    scale: int = 1  #: how many times larger its file shows it, where parvis wrote that enlarged

    @staticmethod
    def of(photo: Image.Image, sheet: tuple[int, int] | None = None, scale: int = 1) -> Beside:
        """What is needed of ``photo``, which may be large: then it need not stay in memory beside a large mask."""
        return Beside(photo.size, _small(photo), sheet, scale)

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height as other programs show it, in whose pixels a user may give a box."""
        return self.size[0] * self.scale, self.size[1] * self.scale


def parse_box(
    text: str, size: tuple[int, int], photo: tuple[int, int] | None = None, fit: Fit = "crop"
) -> tuple[int, int, int, int]:
    """``X0,Y0,X1,Y1`` in pixels, checked against ``size`` (H, W).

    ``photo`` (width, height) and ``fit``: of the picture that the box is a part of; for a box in its pixels, the error
    names the same part in those of the model. Raises RequestError.
    """
    height, width = size
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"box {shown(text)}: expected four whole numbers X0,Y0,X1,Y1") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise RequestError(
            f"box {shown(text)}: expected 0 <= X0 < X1 <= {width} and 0 <= Y0 < Y1 <= {height}, the pixels of this "
            f"model's images{_in_photo((x0, y0, x1, y1), size, photo, fit)}"
        )
    return x0, y0, x1, y1


def _in_photo(box: tuple[int, int, int, int], size: tuple[int, int], photo: tuple[int, int] | None, fit: Fit) -> str:
    """The end of an error: that a photo (width, height) is fitted first, and where ``box`` of it lies then."""
    height, width = size
    if photo is None or photo == (width, height):
        return ""
    x0, y0, x1, y1 = box
    said = f"; the photo of {photo[0]}x{photo[1]} is fitted to {width}x{height} first (fit {fit})"
    if not (0 <= x0 < x1 <= photo[0] and 0 <= y0 < y1 <= photo[1]):
        return said
    same = fitted_box(box, photo, size, fit)
    if same is not None:
        return f"{said}, where this part of it is {','.join(map(str, same))}: give that"
    whole = ",".join(map(str, fitted_box(box, photo, size, "stretch") or ()))
    return f"{said}, which cuts this part of it off; with fit='stretch' (--fit stretch) it is {whole}"


def region(
    named: Named,
    size: tuple[int, int],
    fit: Fit = "crop",
    *,
    mask_from: MaskFrom = "auto",
    photo: Beside | None = None,
) -> Region:
    """The pixels [H,W] of ``size`` that ``named`` means.

    It is a side (a half), the middle ("center"), its "border", a box "X0,Y0,X1,Y1", a mask image (path or PIL image),
    or bool [H,W]. A mask image is fitted as the ``photo`` is, so that a mask drawn over the photo marks the same part
    of it; it has the photo's shape, or ``size``. Raises RequestError, OSError.
    """
    check_fit(fit)
    if not isinstance(mask_from, str) or mask_from not in MASK_FROM:
        raise RequestError(f"mask_from {shown(mask_from)}: expected one of {', '.join(MASK_FROM)}")
    if isinstance(named, np.ndarray):
        if named.dtype != np.bool_ or named.shape != size:
            raise RequestError(
                f"region has shape {named.shape} and type {named.dtype}; expected bool {list(size)}, the pixels of "
                "this model's images"
            )
        check_unmasked("region", named)
        return Region(np.asarray(named))  # a matrix of numpy keeps two axes, whatever it becomes
    if isinstance(named, str):
        mask = _side(named, size)
        if mask is None and named.count(",") == 3 and not os.path.isfile(named):
            mask = np.zeros(size, bool)
            x0, y0, x1, y1 = parse_box(named, size, None if photo is None else photo.shown_size, fit)
            mask[y0:y1, x0:x1] = True
        if mask is not None:
            return Region(mask)
        if not os.path.exists(named):
            no_file = "no such file; " if os.path.splitext(named)[1] or os.sep in named else ""
            raise RequestError(f"region {shown(named)}: {no_file}{REGION}")
    elif not isinstance(named, (Path, Image.Image)):
        raise RequestError(f"region {shown(named)}: {REGION}, a PIL image or a bool array [H,W]")
    name = "mask" if isinstance(named, Image.Image) else f"mask {named}"
    mask_image = opened(named)
    if photo is not None:
        _check_shape(name, mask_image.color.size, photo, size)
    drawn, taken = _drawn(name, mask_image, mask_from, photo)
    if extrema(drawn)[1] < 128:
        raise RequestError(
            f"{name}: marks nothing by its {taken} (it has no {'white' if taken == 'brightness' else 'such'} part); "
            f"paint the region white, or {GIVE}"
        )
    return Region(fit_image(drawn, size, fit) >= 128, taken)


def _side(name: str, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """The region with this name, None where there is none."""
    height, width = size
    mask = np.zeros(size, bool)
    middle = (slice(height // 4, height - height // 4), slice(width // 4, width - width // 4))
    if name == "left":
        mask[:, : width // 2] = True
    elif name == "right":
        mask[:, width // 2 :] = True
    elif name == "top":
        mask[: height // 2] = True
    elif name == "bottom":
        mask[height // 2 :] = True
    elif name in ("center", "border"):
        mask[middle] = True
        if name == "border":
            mask[:] = ~mask
    elif name == "all":
        mask[:] = True
    elif name != "none":
        return None
    return mask


def kept_tokens(kept: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tokens [h,w] of ``grid`` stay, where the pixels ``kept`` [H,W] stay: a token stays if all its pixels do."""
    h, w = grid
    height, width = kept.shape
    cells: NDArray[np.bool_] = np.asarray(kept.reshape(h, height // h, w, width // w).all((1, 3)))
    return cells


def keep_mask(
    size: tuple[int, int],
    grid: tuple[int, int],
    *,
    change: Named | None = None,
    keep: Named | None = None,
    fit: Fit = "crop",
    mask_from: MaskFrom = "auto",
    photo: Picture | None = None,
) -> NDArray[np.bool_]:
    """Which tokens [h,w] of ``grid`` stay, where the region ``change`` is made anew, or the region ``keep`` stays.

    One of the two is given, as in :func:`region`; ``size`` (H, W) in pixels. Raises RequestError, OSError.
    """
    if (change is None) == (keep is None):
        raise RequestError("keep_mask: give one of change= (what is made anew) and keep= (what stays)")
    beside = None if photo is None else Beside.of(open_image(photo))
    named = keep if change is None else change
    assert named is not None
    pixels = region(named, size, fit, mask_from=mask_from, photo=beside).pixels
    return kept_tokens(pixels if change is None else ~pixels, grid)


# -- masks ------------------------------------------------------------------------------------------------------------


def _check_shape(name: str, mask: tuple[int, int], beside: Beside, size: tuple[int, int]) -> None:
    """Raise RequestError where a mask (width, height) would not lie on the photo as it was drawn."""
    photo = beside.size
    if mask == beside.sheet != photo:
        raise RequestError(
            f"{name} is {mask[0]}x{mask[1]} pixels, as the whole sheet; the image is {photo[0]}x{photo[1]}: draw the "
            "mask over that image alone"
        )
    skew = mask[0] * photo[1] / (mask[1] * photo[0])
    # One pixel more or less comes from rounding, in a smaller copy of the photo.
    if abs(skew - 1) > 0.01 + 1 / min(mask) and mask != (size[1], size[0]):
        raise RequestError(
            f"{name} is {mask[0]}x{mask[1]} pixels, the image {photo[0]}x{photo[1]}; expected the shape of the image, "
            f"or {size[1]}x{size[0]}: draw the mask over the image"
        )


def _drawn(name: str, mask: Opened, mask_from: MaskFrom, photo: Beside | None) -> tuple[Image.Image, str]:
    """The region of a mask as an image (L) in which it is 128 or more, and what of the mask was taken."""
    if mask_from == "auto":
        mask_from = "brightness" if mask.alpha is None else _meaning(name, mask.color, mask.alpha, photo)
        if mask_from == "brightness":
            _check_grey(name, mask.color)
    if mask_from == "brightness":
        grey = mask.color.convert("L")
        if mask.alpha is not None:  # what is transparent is not painted
            black = Image.new("L", grey.size)
            black.paste(grey, mask=mask.alpha)
            grey = black
        return grey, mask_from
    if mask.alpha is None:
        raise RequestError(f"{name}: has no transparent part, so mask_from {mask_from!r} marks all or nothing of it")
    return mask.alpha if mask_from == "alpha" else mask.alpha.point([255 - v for v in range(256)]), mask_from


def _meaning(name: str, color: Image.Image, alpha: Image.Image, photo: Beside | None) -> MaskFrom:
    """What a mask with a transparent part means. Raises RequestError where it could mean two things."""
    same = photo is not None and photo.size == color.size
    color, alpha = _small(color), _small(alpha)
    opaque = np.asarray(alpha) >= 128
    if not opaque.any():
        raise RequestError(f"{name}: all of it is transparent; paint the region white")
    if opaque.all():  # a veil of even transparency
        return "brightness"
    painted = np.asarray(color)[opaque]
    white = (painted.min(1) < WHITE).mean() <= SPECKS
    if photo is not None and same and _alike(painted, np.asarray(photo.small)[opaque]):
        if not white:
            return "inverse-alpha"  # the photo itself with a hole
    elif white:
        return "alpha"
    elif len(np.unique(painted >> 3, axis=0)) > FLAT:
        return "inverse-alpha"
    raise RequestError(
        f"{name}: it is not known whether its opaque or its transparent part is the region, as it is neither white "
        "strokes on a transparent layer nor a picture with a hole; give mask_from= (--mask-from) alpha (what is "
        "opaque) or inverse-alpha (what is transparent)"
    )


def _check_grey(name: str, color: Image.Image) -> None:
    """Raise RequestError for a mask with colours that are neither black nor white."""
    small = _small(color)
    scale, color = color.width / small.width, small
    strong = np.asarray(color).max(2) >= 128
    dark = np.asarray(color.convert("L")) < 128
    odd = strong & dark  # for instance red: is it painted, or is it not white?
    if odd.mean() > SPECKS:
        y, x = (int(v) for v in np.argwhere(odd)[0])
        r, g, b = np.asarray(color)[y, x]
        x, y = int(x * scale), int(y * scale)
        raise RequestError(
            f"{name}: has colours that are neither white nor black (#{r:02x}{g:02x}{b:02x} at {x},{y}); paint the "
            "region white and the rest black, or give mask_from= (--mask-from) brightness"
        )


def _alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether nearly all colours [n,3] differ by what saving as JPEG does, or less."""
    off = np.abs(one.astype(np.int16) - other.astype(np.int16)).max(1) > 8
    return bool(off.mean() <= SPECKS)


def _small(image: Image.Image) -> Image.Image:
    """Every k-th pixel of a large ``image``, enough to judge it by."""
    step = int(np.ceil(np.sqrt(image.width * image.height / 2**22)))
    if step <= 1:
        return image
    size = (max(1, image.width // step), max(1, image.height // step))
    return image.resize(size, Image.Resampling.NEAREST)
