"""Raw pixels in a folder, as ``models/recipe/render.mjs`` writes them: one file of pixels, labels, ``meta.json``.

No torch here, since the scripts of the recipe that prepare data need only numpy.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_model.objects import unique
from par_model.system import naming
from par_model.training.files import InputError, regular

IMAGES = ("images.u8", "labels.u8", "meta.json")
#: The numbers of ``meta.json`` and the most that each may be.
MOST = {"count": 10**9, "size": 4096, "frames": 4096, "channels": 4}


def shown(value: object) -> str:
    """``value`` of a JSON file for a message, short."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a very large integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_meta(folder: Path, *numbers: str, names: str) -> dict[str, Any]:
    """What ``meta.json`` in ``folder`` says, with ``numbers`` as whole numbers and class names at ``names``.

    Raises InputError that names the file and the entry, OSError.
    """
    path = folder / "meta.json"
    entries = f"an object with {', '.join(numbers)} and {names}"
    try:
        with naming(path):
            text = regular(path).read_text(encoding="utf-8")
        meta = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({str(error)[:100]}); expected {entries}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: holds {shown(meta)}; expected {entries}")
    for name in numbers:
        value = meta.get(name)
        if type(value) is not int or not 1 <= value <= MOST[name]:
            given = f"{name} is {shown(value)}" if name in meta else f"has no {name}"
            raise InputError(f"{path}: {given}; expected a whole number from 1 to {MOST[name]}")
    if not isinstance(meta.get(names), list) or not all(isinstance(name, str) for name in meta[names]):
        raise InputError(f"{path}: {names} is {shown(meta.get(names))}; expected a list of the names of the classes")
    return meta


def read_pixels(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The pixels in ``path``, memory-mapped, as uint8 of ``shape``. Raises InputError where its size differs."""
    size, expected = regular(path).stat().st_size, math.prod(shape)
    if size != expected:
        raise InputError(
            f"{path}: has {size} bytes; expected {expected}, {'x'.join(map(str, shape))} by meta.json: one of the two "
            "is not whole, or is of other data; make them again"
        )
    with naming(path):
        return np.memmap(path, np.uint8, mode="r", shape=shape)


def read_labels(folder: Path, count: int, classes: int) -> NDArray[np.uint8]:
    """``labels.u8`` in ``folder``, of ``count`` items in ``classes`` classes. Raises InputError, OSError."""
    path = folder / "labels.u8"
    with naming(path):
        labels = np.frombuffer(regular(path).read_bytes(), np.uint8)
    if len(labels) != count:
        raise InputError(f"{folder}: meta.json has count {count}, labels.u8 {len(labels)} labels; make them again")
    if labels.max() >= classes:
        raise InputError(f"{folder} has label {labels.max()} and {classes} class names; make them again")
    return labels


@dataclass(frozen=True)
class RawImages:
    """Images of one size: uint8 [count,size,size,3], memory-mapped, labels [count], and what ``meta.json`` says."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    meta: dict[str, Any]

    @staticmethod
    def open(folder: Path) -> RawImages:
        """The raw images in ``folder``. Raises InputError, OSError."""
        meta = read_meta(folder, "count", "size", names="styles")
        images = read_pixels(folder / "images.u8", (meta["count"], meta["size"], meta["size"], 3))
        return RawImages(images, read_labels(folder, meta["count"], len(meta["styles"])), meta)
