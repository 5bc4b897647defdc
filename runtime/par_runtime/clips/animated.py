"""GIF, WebP and animated PNG, through Pillow: encoded in memory, and read frame by frame."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from par_runtime.clips.formats import times_ms
from par_runtime.clips.mp4 import ChangedSizeError
from par_runtime.images.opening import open_image
from par_runtime.images.pillow import ready
from par_runtime.images.png import CHUNK, enlarged

TEXT = "parvis "  #: what the comment of a GIF, or the description of a WebP, begins with
DESCRIPTION = 0x010E  #: ImageDescription of EXIF
COLOURS = 256  #: of a GIF


@dataclass(frozen=True, eq=False)
class FewColours:
    """Frames as a GIF keeps them: ``indices`` [T,H,W] into one table of ``colours`` [K,3]."""

    colours: NDArray[np.uint8]
    indices: NDArray[np.uint8]

    @property
    def frames(self) -> NDArray[np.uint8]:
        """The frames [T,H,W,3] that reading the GIF gives."""
        shown: NDArray[np.uint8] = self.colours[self.indices]
        return shown


def few_colours(frames: NDArray[np.uint8]) -> FewColours:
    """``frames`` [T,H,W,3] in at most 256 colours, the same for all: exact where they have no more, else the nearest,
    without a pattern of dots, which would flicker.
    """
    count, height, width, _ = frames.shape
    colours, places = np.unique(frames.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > COLOURS:
        ready()
        tall = Image.fromarray(frames.reshape(count * height, width, 3))
        few = tall.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
        colours = np.array(few.getpalette("RGB"), np.uint8).reshape(-1, 3)
        places = np.asarray(few)
    return FewColours(colours.astype(np.uint8), places.reshape(count, height, width).astype(np.uint8))


def as_gif(few: FewColours, scale: int, fps: float, text: str) -> bytes:
    """A GIF of ``few``, enlarged, with ``text`` as its comment."""
    ready()
    images = []
    for each in few.indices:
        image = Image.fromarray(each.repeat(scale, 0).repeat(scale, 1))
        image.putpalette(few.colours.tobytes())
        images.append(image)
    durations = times_ms(len(images), fps, 10)
    return _saved(images, "GIF", duration=durations, loop=0, optimize=False, comment=text_of(text))


def as_webp(frames: NDArray[np.uint8], scale: int, fps: float, text: str) -> bytes:
    """A WebP of ``frames`` [T,H,W,3], enlarged, without loss, with ``text`` as the description in its EXIF."""
    ready()
    exif = Image.Exif()
    exif[DESCRIPTION] = text_of(text).decode()
    return _saved(
        [Image.fromarray(enlarged(each, scale)) for each in frames],
        "WEBP",
        duration=times_ms(len(frames), fps),
        loop=0,
        lossless=True,
        exif=exif.tobytes() if text else b"",
    )


def as_apng(frames: NDArray[np.uint8], scale: int, fps: float, text: str) -> bytes:
    """An animated PNG of ``frames`` [T,H,W,3], enlarged, with ``text`` in the entry that the PNGs of images have."""
    chunk = PngImagePlugin.PngInfo()
    if text:
        chunk.add_itxt(CHUNK, text)
    images = [Image.fromarray(enlarged(each, scale)) for each in frames]
    return _saved(images, "PNG", duration=times_ms(len(frames), fps), loop=0, pnginfo=chunk)


def text_of(text: str) -> bytes:
    """A recipe's entry as the comment or description of a file."""
    return f"{TEXT}{text}".encode("ascii") if text else b""


def _saved(images: list[Image.Image], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    ready()
    images[0].save(out, kind, save_all=True, append_images=images[1:], **options)
    return out.getvalue()


class Animation:
    """A GIF, WebP or PNG that Pillow has opened: ``size`` (width, height), ``text`` (parvis' entry), its frames."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self.size: tuple[int, int] = image.size
        self.text = _entry(image)

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Each frame [H,W,3], upright and on white, and the seconds that it is shown; 0 where the file does not say."""
        image = self._image
        index = int(bool(getattr(image, "default_image", False)))  # of a PNG: a picture beside the animation
        while True:
            try:
                image.seek(index)
            except EOFError:
                return
            if image.size == self.size:
                image.load()
            if image.size != self.size:  # a GIF's grows at the one or the other
                raise ChangedSizeError(image.size)
            seconds = image.info.get("duration", 0)
            yield (
                np.asarray(open_image(image)),
                float(seconds) / 1000 if isinstance(seconds, (int, float)) and 0 < seconds < 1e9 else 0.0,
            )
            index += 1


def _entry(image: Image.Image) -> str | None:
    """parvis' entry of an image that is open; None where it has none."""
    if image.format == "PNG":
        text = image.info.get(CHUNK)  # not image.text, which decodes every frame
        return str(text) if isinstance(text, str) else None
    text = image.info.get("comment") if image.format == "GIF" else image.getexif().get(DESCRIPTION)
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    return text.removeprefix(TEXT) if isinstance(text, str) and text.startswith(TEXT) else None
