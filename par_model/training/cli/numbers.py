"""The limits of every number that the trainers take, in one place: what is beyond them is one line, before any work.

What two numbers must be to each other, the configurations of the models say (``par_model/config.py``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from par_model.training.files import InputError


@dataclass(frozen=True)
class Limit:
    """The numbers that an option takes: from ``least`` to ``most``; ``above``, ``below``: without that one itself."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def allows(self, value: float) -> bool:
        """Whether ``value`` is one of them; no infinity and no NaN is."""
        if not math.isfinite(value) or not self.least <= value <= self.most:
            return False
        return not (self.above and value == self.least) and not (self.below and value == self.most)

    def __str__(self) -> str:
        end = "and below" if self.below else "at most"
        if self.above:
            return f"a number above {self.least}" + ("" if math.isinf(self.most) else f", {end} {self.most}")
        if math.isinf(self.most):
            return f"{self.least} or more"
        return f"{self.least} or more, and below {self.most}" if self.below else f"{self.least} to {self.most}"


#: By the names of the options, ``_`` for ``-``; of a list, each number of it.
LIMITS = {
    "batch": Limit(1, 10**6),
    "channels": Limit(1, 2**14),
    "codes": Limit(2, 2**16),  # codes.npz holds ids of 16 bits
    "dim": Limit(1, 2**16),
    "dropout": Limit(0, 1, below=True),
    "ema": Limit(0, 1, below=True),
    "group_size": Limit(1, 2**16),
    "guidance": Limit(0, 1000),
    "heads": Limit(1, 2**12),
    "last_blocks": Limit(1, 64),
    "layers": Limit(1, 1000),
    "levels": Limit(2, 2**16),
    "lr": Limit(0, 1000, above=True),
    "minutes": Limit(0, above=True),
    "multipliers": Limit(1, 2**10),
    "muon_lr": Limit(0, 1000, above=True),
    "norm_groups": Limit(1, 2**14),
    "report": Limit(1, 10**15),
    "res_blocks": Limit(1, 64),
    "seed": Limit(0, 2**63 - 1),
    "sheet": Limit(1, 10**15),
    "size": Limit(1, 2**14),
    "steps": Limit(1, 10**15),
    "structure": Limit(0, 10**6),
    "time_strides": Limit(1, 2),
    "vocab": Limit(2, 2**16),
    "warmup": Limit(0, 10**15),
    "widths": Limit(1, 2**14),
    "z_channels": Limit(1, 2**14),
}
#: How to say more about some of them.
ADVICE = {
    "structure": "; 1 to 3 are good numbers",
    "lr": "; 0.001 is a usual one",
    "muon_lr": "; 0.02 is the usual one",
}


def check(args: argparse.Namespace, limits: Mapping[str, Limit] = LIMITS) -> None:
    """Raise InputError for the first number in ``args`` that is beyond the limits of its option."""
    for name, value in vars(args).items():
        values: list[Any] = value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, (int, float)) and not isinstance(each, bool) and not limits[name].allows(each):
                shown = "a very large number" if isinstance(each, int) and abs(each) > 10**30 else each
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {shown}: expected {limits[name]}{ADVICE.get(name, '')}")
