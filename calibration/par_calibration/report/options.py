"""What a report measures, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from par_calibration.heldout import HeldOut
from par_calibration.report.budget import Budget
from par_runtime.bundle import Bundle

#: Held-out images whose logits are compared. 240 images of the demo's 256 tokens are 61,440 positions: the share of
#: equal codes is known to 0.1 points then.
IMAGES = 240
#: Images that each side draws, for the tokens until the first divergence and the distance of generated sets.
SAMPLES = 96
#: Large models compare fewer: as many as take this many products of a parameter and a token, about five minutes of two
#: cores for each network. PAR-B at 576 tokens has 122, PAR-L and larger ones the least.
WORK = 8e12
LEAST_IMAGES = 40


@dataclass(frozen=True)
class Options:
    """What :func:`par_calibration.report.compare` measures.

    ``arithmetic``, ``cache`` and ``decoder_precision``: what the candidate will run in (default: what its manifest
    says); its step is measured in fp32 too where that is another, and its decoder against fp32. ``samples`` 0 leaves
    out generated images and all that needs them.
    """

    images: int | None = None  #: held-out images, default :data:`IMAGES`, fewer of large models
    samples: int | None = None  #: generated images of each set, default :data:`SAMPLES`, fewer of large models
    seed: int = 0  #: generated images have seeds that follow from it, and differ from those that were recorded
    labels: tuple[int, ...] = ()  #: classes of generated images, which take turns; default: all
    guidance: float | None = None  #: of guided logits and generated images; default: the bundle's
    real: Path | None = None  #: a folder of pictures or a .npz of ``parvis encode``; default: what the bundle holds
    held: HeldOut | None = None  #: the held-out images, in place of ``real``, where the caller has read them
    arithmetic: str | None = None
    cache: str | None = None
    decoder_precision: str | None = None
    threads: int | None = None
    budget: Budget | None = None  #: default: that of the candidate's weights
    show: int = 12  #: pairs of images of both models
    scratch: Path | None = None  #: folder of the temporary file of logits; default: the system's
    say: Callable[[str], object] = lambda _: None

    def images_of(self, bundle: Bundle) -> int:
        """How many held-out images of ``bundle`` are compared."""
        return _affordable(bundle, IMAGES) if self.images is None else self.images

    def samples_of(self, bundle: Bundle) -> int:
        """How many images of each set are generated with ``bundle``."""
        return _affordable(bundle, SAMPLES) if self.samples is None else self.samples


def _affordable(bundle: Bundle, most: int) -> int:
    images = int(WORK / (bundle.model["parameters"] * bundle.n_tokens))
    return min(most, max(LEAST_IMAGES, images))
