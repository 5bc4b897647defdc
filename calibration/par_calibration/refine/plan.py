"""What a training is of: how many steps, of which images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from par_calibration.errors import CalibrationError
from par_calibration.quantise.choice import How
from par_calibration.record.record import GUIDANCE_OF_UNGUIDED
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int

BATCH = 4  #: images of a step; each is two rows, one with its class and one without
MOST_STEPS = 100_000
#: Different images, at most: longer trainings see them again, in another order.
MOST_IMAGES = 4096


@dataclass(frozen=True)
class Plan:
    """One training. All that decides its result, except ``threads``."""

    bundle: str  #: its hash
    steps: int
    seed: int
    guidance: float
    labels: tuple[int, ...]  #: the class of each image
    dtype: str  #: of the codes
    group: int
    kept: tuple[str, ...]
    start: str  #: what the codes begin from: the recording
    threads: int | None = None

    @staticmethod
    def of(
        bundle: Bundle,
        how: How,
        kept: frozenset[str],
        steps: int,
        seed: int,
        start: str,
        classes: Sequence[int] | None = None,
        **more: Any,
    ) -> Plan:
        """The plan of ``steps`` steps; ``classes`` of its images (default: all) take turns. Raises CalibrationError."""
        if not 1 <= steps <= MOST_STEPS:
            raise CalibrationError(f"--refine {steps}: expected a number of steps from 1 to {MOST_STEPS}, as 2000")
        count = min(steps * BATCH, MOST_IMAGES)
        turns = np.resize(np.arange(bundle.n_classes) if classes is None else np.array(classes), count)
        labels = np.random.default_rng((seed % 2**63, 1)).permutation(turns)
        guidance = bundle.defaults.guidance if bundle.defaults.guidance > 1 else GUIDANCE_OF_UNGUIDED
        return Plan(
            bundle.hash, steps, seed, guidance, tuple(map(int, labels)), how.dtype, how.group, tuple(sorted(kept)),
            start, **more,
        )  # fmt: skip

    @property
    def images(self) -> int:
        """How many different images are learned from."""
        return len(self.labels)

    def batch(self, step: int) -> Int:
        """The images [BATCH] of a step: all of them once, in an order of lot, then all again in another order."""
        places = np.arange(step * BATCH, (step + 1) * BATCH)
        rounds, place = places // self.images, places % self.images
        orders = {r: np.random.default_rng((self.seed % 2**63, 2, int(r))).permutation(self.images) for r in rounds}
        return np.array([orders[r][p] for r, p in zip(rounds, place, strict=True)])

    def text(self) -> str:
        """What must be the same for a stopped training to go on."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "threads"}, sort_keys=True)
