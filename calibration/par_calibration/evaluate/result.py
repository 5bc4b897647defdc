"""What an evaluation found, as numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from par_runtime.metrics import finite
from par_runtime.request import Settings


@dataclass(frozen=True)
class Likelihood:
    """How likely held-out images are to a bundle: nats per token, the less the better."""

    bundle: str
    n: int  #: tokens per group call
    calls: int  #: per image
    backend: str
    images: int
    images_from: str
    codes: int  #: of the codebook; guessing all alike has log(codes) nats
    nats: float
    low: float | None  #: the 95 % interval of ``nats``, by resampling the images
    high: float | None
    phases: dict[str, float]  #: nats per token of the calls of each phase
    classes: dict[str, float]  #: nats per token of the images of each class
    change: float | None = None  #: less those of the first bundle, where both have the same images as the same tokens
    change_low: float | None = None
    change_high: float | None = None


@dataclass(frozen=True)
class Kept:
    """What a bundle's tokenizer keeps of real pictures: encoded and decoded."""

    bundle: str
    images: int
    psnr: float | None  #: dB, of all pixels; None where nothing is lost
    codes_used: float  #: share of the codebook that occurs


@dataclass(frozen=True)
class Set:
    """A set of images beside the held-out ones, in features of an encoder."""

    name: str
    images: int
    distance: float  #: Frechet distance as of infinitely many images; by chance it may be below 0
    margin: float  #: sets made with other seeds are within so much of it, at least 95 % of them
    spread: float | None  #: how much images of a class differ, relative to the held-out ones
    settings: Settings | None = None  #: None: of no generation, or not known


@dataclass(frozen=True)
class Comparison:
    """Sets of generated images against held-out ones."""

    features: str  #: what is compared, in words
    features_of: str  #: the bundle whose encoder gives them
    compared: int  #: images of each side in a draw
    draws: int
    held_out: int
    pixels: str  #: whether the held-out images are pictures, or what a decoder makes of their tokens
    chance: Set  #: held-out images against others of them: 0, but for chance
    sets: tuple[Set, ...]


@dataclass(frozen=True)
class Evaluation:
    """All of it; what was left out is in ``notes``, with the reason."""

    likelihoods: tuple[Likelihood, ...]
    kept: tuple[Kept, ...]
    comparison: Comparison | None
    seed: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; every number is finite."""
        cleaned: dict[str, Any] = finite(asdict(self))
        return cleaned
