"""Which images an evaluation takes: image i of ``count`` has the seed ``seed + i``, and a label that follows from it.

So an image does not depend on the part that it is made in, nor on how many images there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime import __version__
from par_runtime.arguments import choice, given, whole
from par_runtime.backends.base import image_shape
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.request import SEED_LIMIT, Settings, image_settings

LABELS = ("random", "balanced")
MOST_SAMPLES = 10**7  #: their labels are in memory
MOST_PIXELS = 4096  #: of a side
_MASK = SEED_LIMIT - 1


@dataclass(frozen=True)
class Plan:
    """The images of one file: those from number ``start`` to before ``stop``, of ``count``."""

    bundle: Bundle
    settings: Settings
    count: int
    seed: int
    labels: str  #: of LABELS
    size: tuple[int, int]  #: height and width of the images in the file
    start: int
    stop: int

    @staticmethod
    def of(
        bundle: Bundle,
        count: int = 50_000,
        seed: int = 0,
        labels: str = "random",
        size: int | None = None,
        part: tuple[int, int] = (1, 1),
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        guidance_interval: int | None = None,
    ) -> Plan:
        """The plan of ``count`` images, checked.

        ``labels``: "random", each class as likely as another (as the published FIDs were made), or "balanced", where
        image i has class i modulo the number of classes. ``size``: resize the images, which must be square, to so many
        pixels a side. ``part``: (I, K), the images of process I of K. Settings as for ``Pipeline.generate``; what is
        left out is the bundle's. Raises RequestError.
        """
        if not isinstance(bundle, Bundle):
            raise RequestError(f"bundle: expected a Bundle, as that of a pipeline, not a {type(bundle).__name__}")
        if bundle.image_size is None:
            raise RequestError(
                f"{bundle.path}: this bundle ends at tokens and makes no images; give one with a decoder"
            )
        count = whole("count", count, 1, MOST_SAMPLES, " images")
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise RequestError(f"part {given(part)}: expected two numbers, (2, 8) for the second of eight parts")
        parts = whole("part: the second number", part[1], 1, count, ", the number of parts")
        index = whole("part: the first number", part[0], 1, parts, ", the part to make")
        if size is not None and bundle.image_size[0] != bundle.image_size[1]:
            height, width = bundle.image_size
            raise RequestError(f"size {given(size)}: makes squares, and the images are {width}x{height}; leave it out")
        pixels = None if size is None else whole("size", size, 1, MOST_PIXELS, " pixels of a side")
        choice("labels", labels, LABELS)
        (settings,) = image_settings(
            bundle,
            1,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            guidance_interval=guidance_interval,
        )
        return Plan(
            bundle,
            settings,
            count,
            whole("seed", seed, 0, SEED_LIMIT - 1),
            labels,
            bundle.image_size if pixels is None else (pixels, pixels),
            count * (index - 1) // parts,
            count * index // parts,
        )

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[H,W,3] of an image in the file, or [T,H,W,3] of a clip."""
        return (*image_shape(self.bundle)[:-3], *self.size, 3)

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """The seeds of the images with these ``numbers``, of all ``count``."""
        return [(self.seed + i) % SEED_LIMIT for i in numbers]

    def classes(self, numbers: Sequence[int]) -> list[int]:
        """Their classes."""
        return classes_of(self.labels, self.bundle.n_classes, self.seed, numbers)

    def all_classes(self) -> NDArray[np.int64]:
        """The classes of the images of this file, [M]."""
        return np.array(self.classes(range(self.start, self.stop)), np.int64)

    def about(self, made_on: dict[str, Any]) -> dict[str, Any]:
        """What a file says about its images: all that they depend on."""
        return {
            "parvis": __version__,
            "bundle": {"name": self.bundle.name, "hash": self.bundle.hash},
            "settings": asdict(self.settings),
            "count": self.count,
            "seed": self.seed,
            "labels": self.labels,
            "classes": self.bundle.n_classes,
            "shape": list(self.image_shape),
            "start": self.start,
            "stop": self.stop,
            "made_on": made_on,
        }


def classes_of(labels: str, n_classes: int, seed: int, numbers: Sequence[int]) -> list[int]:
    """The classes of the images with these ``numbers``, of a plan with these ``labels`` and this ``seed``."""
    if labels == "balanced":
        return [i % n_classes for i in numbers]
    return [_mixed((seed + i) % SEED_LIMIT) * n_classes >> 64 for i in numbers]


def _mixed(seed: int) -> int:
    """A number of 64 bits that looks random, of ``seed``: the finalizer of SplitMix64 (Steele, Lea, Flood 2014).

    numpy's generators may give other numbers in another version; these labels never change.
    """
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31
