"""The images that a tokenizer is trained on, or that are encoded: a folder of pictures, or one file of raw pixels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from par_model.system import OF_THE_SYSTEM, naming
from par_model.training.files import InputError, text_of
from par_model.training.raw import IMAGES as RAW
from par_model.training.raw import RawImages
from par_model.words import printable

#: Readers that run nothing, as of the runtime (Pillow gives EPS files to Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO", "TGA")
EXPECTED = (
    "expected a folder with a folder of pictures for each class (or with the pictures themselves, of one class), or "
    f"the raw form: {', '.join(RAW)}"
)


@dataclass(frozen=True)
class ImageFolder:
    """Images of one size with their classes.

    ``images`` is uint8 [count, size, size, 3], memory-mapped (the raw form), or the files of pictures, which are read
    when a batch needs them.
    """

    images: np.ndarray | list[Path]
    labels: np.ndarray  #: [count] int
    class_names: list[str]
    size: int  #: pixels of a side

    @staticmethod
    def open(path: Path, size: int | None = None) -> ImageFolder:
        """Find the images in the folder ``path``. Pictures are fitted to ``size``. Raises InputError, OSError."""
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; {EXPECTED}")
        if (path / "meta.json").is_file():
            raw = _raw(path)
            if size not in (None, raw.size):
                raise InputError(f"--size {size}: the raw images in {path} have {raw.size} pixels a side")
            return raw
        return _pictures(path, size)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def raw(self) -> np.ndarray | None:
        """The images as one array, where they are one; None for files of pictures."""
        return None if isinstance(self.images, list) else self.images

    def pixels(self, index: np.ndarray) -> Tensor:
        """The images at ``index`` [B]: [B,H,W,3] uint8. Raises InputError for a picture that is damaged."""
        if isinstance(self.images, list):
            return torch.from_numpy(np.stack([picture(self.images[i], self.size) for i in index]))
        return torch.from_numpy(np.ascontiguousarray(self.images[index]))

    def scaled(self, pixels: Tensor) -> Tensor:
        """[B,3,H,W] float32 in [-1,1] of ``pixels`` [B,H,W,3] uint8, on their device."""
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)

    def batch(self, index: np.ndarray) -> Tensor:
        """The images at ``index`` [B]: [B,3,H,W] float32 in [-1,1]. Raises InputError for a picture that is damaged."""
        return self.scaled(self.pixels(index))


def _raw(path: Path) -> ImageFolder:
    """The form that ``models/recipe/render.mjs`` writes."""
    try:
        raw = RawImages.open(path)
    except (InputError, FileNotFoundError) as error:
        raise InputError(f"{path}: not the raw form of images ({text_of(error)}); {EXPECTED}") from error
    return ImageFolder(raw.images, raw.labels, raw.meta["styles"], raw.meta["size"])


def _pictures(path: Path, size: int | None) -> ImageFolder:
    """A folder of pictures, in a folder for each class or of one class. Every file is identified, none is decoded."""
    known = Image.registered_extensions()
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    loose = _files(path, known, deep=False)
    if loose and any(_files(folder, known) for folder in folders):
        raise InputError(
            f"{path} holds {len(loose)} picture{'s' if len(loose) > 1 else ''} beside the folders of classes; put each "
            "into one of these"
        )
    classes = [(path.resolve().name, loose)] if loose else [(folder.name, _files(folder, known)) for folder in folders]
    classes = [(name, files) for name, files in classes if files]
    if not classes:
        raise InputError(f"{path} holds no pictures; {EXPECTED}")
    if size is None:
        raise InputError(f"{path} holds pictures; give --size, the pixels of a side that they are fitted to")
    files = [file for _, each in classes for file in each]
    for file in files:
        with _opened(file):
            pass
    labels = np.repeat(np.arange(len(classes)), [len(each) for _, each in classes])
    return ImageFolder(files, labels, [_class_name(name) for name, _ in classes], size)


def _class_name(folder: str) -> str:
    """The name of a class whose pictures lie in a folder of this name, as a bundle may have it: UTF-8, printable."""
    return printable(os.fsencode(folder).decode("utf-8", errors="backslashreplace"))


def _files(folder: Path, known: dict[str, str], deep: bool = True) -> list[Path]:
    """The files in ``folder`` whose names end like a picture's, by name."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in found if f.suffix.lower() in known and not f.name.startswith(".") and f.is_file())


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture ``file``, identified by Pillow. Any fault of it, here or inside, is an InputError, which names it.

    What the system cannot do (a broken disk, no permission, too many open files) stays an OSError, with the name.
    """
    try:
        with warnings.catch_warnings(), naming(file):
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            with file.open("rb") as opened:  # Pillow leaves one open whose first bytes it cannot read
                yield Image.open(opened, formats=[name for name in FORMATS if name in Image.OPEN])
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{file}: no picture that can be read; expected PNG, JPEG, WebP, TIFF or the like: take it away"
        ) from error
    except Exception as error:  # readers of damaged files raise nearly anything
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            raise
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        why = " ".join(why.split())[:120] or type(error).__name__
        raise InputError(f"{file}: no picture that can be read ({why}); mend it or take it away") from error


def picture(file: Path, size: int) -> np.ndarray:
    """A picture as uint8 [size, size, 3]: upright, on white where transparent, its largest middle square.

    Raises InputError for a damaged one, and for one of wide grey values, whose white is unknown; OSError.
    """
    with _opened(file) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            raise InputError(f"{file}: grey values of more than 8 bits; save it with 8 bits")
        if "A" in upright.mode or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        side = min(upright.size)
        left, top = (upright.width - side) // 2, (upright.height - side) // 2
        square = upright.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
