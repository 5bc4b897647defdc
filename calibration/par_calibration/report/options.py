"""What a report measures, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from par_calibration.report.budget import Budget

#: Held-out images whose logits are compared. 240 images of the demo's 256 tokens are 61,440 positions: the share of
#: equal codes is known to 0.1 points then.
IMAGES = 240
#: Positions that are compared by default at most, since every one takes a call of three networks: at 576 tokens, 40
#: images of 23,040 positions.
POSITIONS = 61_440
LEAST_IMAGES = 40
#: Images that each side draws, for the tokens until the first divergence and the distance of generated sets.
SAMPLES = 96


@dataclass(frozen=True)
class Options:
    """What :func:`par_calibration.report.compare` measures.

    ``arithmetic`` and ``cache``: what the candidate will run in (default: what its manifest says); it is measured in
    fp32 too where that is another. ``samples`` 0 leaves out generated images and all that needs them.
    """

    images: int | None = None  #: held-out images, default :data:`IMAGES`, fewer for models with more tokens
    samples: int | None = None  #: generated images of each set, default :data:`SAMPLES`
    seed: int = 0  #: generated images have seeds that follow from it, and differ from those that were recorded
    labels: tuple[int, ...] = ()  #: classes of generated images, which take turns; default: all
    guidance: float | None = None  #: of guided logits and generated images; default: the bundle's
    real: Path | None = None  #: a folder of pictures or a .npz of ``parvis encode``; default: what the bundle holds
    arithmetic: str | None = None
    cache: str | None = None
    threads: int | None = None
    budget: Budget | None = None  #: default: that of the candidate's weights
    show: int = 12  #: pairs of images of both models
    scratch: Path | None = None  #: folder of the temporary file of logits; default: the system's
    say: Callable[[str], object] = lambda _: None

    def images_of(self, n_tokens: int) -> int:
        """How many held-out images are compared of a model of ``n_tokens``."""
        if self.images is not None:
            return self.images
        return min(IMAGES, max(LEAST_IMAGES, POSITIONS // n_tokens))
