"""The GPUs that kernels are built for: what the planner of tiles and the compiler must know about each.

A target is a compute capability; its figures are those of the card that it stands for, by its data sheet. Another card
of the same capability runs the same kernels; ``parvis tune`` finds out what suits it better.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from par_export.errors import BuildError
from par_runtime.checked import shown
from par_runtime.cost.data_sheets import DATA_SHEETS, DataSheet

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A compute capability (90 for SM90) and the card that it stands for.

    ``processors``: multiprocessors of the card. Shared memory in bytes: the most that a block may use, and what a
    processor has, of which each block takes 1 KiB more than it asks for. ``registers``: 32-bit registers of a
    processor. ``sheet``: bandwidth and matrix rate. ``early``: kernels may be launched early, where the GPU can;
    ``ahead_bytes``: matrices of up to so many bytes are then fetched ahead while the kernel before ends;
    ``held_bytes``: each block of a product loads so many bytes of weights before it waits, and keeps them;
    ``held_keys``: so does each block of attention with the keys and values of earlier calls, where they fit;
    ``at_once``: the next kernel may be launched as soon as a kernel has waited, not only when its sums are done.
    """

    capability: int
    card: str
    processors: int
    shared_block: int
    shared_processor: int
    sheet: DataSheet
    registers: int = 65536
    early: bool = True
    ahead_bytes: int = 8 * 2**20
    held_bytes: int = 0
    held_keys: bool = False
    at_once: bool = False

    @property
    def name(self) -> str:
        """ "SM90" and the like."""
        return f"SM{self.capability}"

    @property
    def dependent(self) -> bool:
        """Whether a kernel may be launched before the one ahead of it has ended, and wait for it by itself."""
        return self.early and self.capability >= 90

    @property
    def from_shared(self) -> bool:
        """Whether the matrix units read activations, and weights that are numbers, from shared memory, so that a thread
        has more registers for sums.
        """
        return self.capability // 10 in (9, 10)


#: The matrix rates of RTX cards are those with sums in fp32.
TARGETS = {
    target.name: target
    for target in (
        Target(80, "A100", 108, 163 * KIB, 164 * KIB, DATA_SHEETS["A100-80"]),
        Target(86, "A10", 72, 99 * KIB, 100 * KIB, DataSheet(600, 125)),
        Target(89, "RTX 4090", 128, 99 * KIB, 100 * KIB, DATA_SHEETS["RTX 4090"]),
        Target(90, "H200", 132, 227 * KIB, 228 * KIB, DATA_SHEETS["H200"]),
        Target(100, "B200", 148, 227 * KIB, 228 * KIB, DataSheet(8000, 2250)),
        Target(120, "RTX 5090", 170, 99 * KIB, 100 * KIB, DataSheet(1792, 209)),
    )
}
OLDEST = 80


def target_of(name: str) -> Target:
    """The target of that name, "SM90" or "sm90". Raises BuildError for one that no kernels are built for."""
    target = TARGETS.get(name.upper())
    if target is not None:
        return target
    number = re.fullmatch("SM([1-9][0-9]{1,2})", name, re.ASCII | re.IGNORECASE)
    capability = int(number.group(1)) if number else None
    why = ""
    if capability is None:
        why = "; expected SM and a compute capability"
    elif capability < OLDEST:
        why = f"; before SM{OLDEST} GPUs lack the copies that the kernels need: --engine tensorrt builds for SM75"
    elif runs_on(capability) is not None:
        why = f"; an engine for {runs_on(capability)} runs there too"
    else:
        why = "; --engine tensorrt may build for it"
    raise BuildError(f"target {shown(name)}: engines of kernels are built for {', '.join(TARGETS)}, or local{why}")


def runs_on(capability: int) -> str | None:
    """The name of the target whose kernels run best on a GPU of ``capability`` (87 for SM87); None where none does.

    What was compiled for 8.x runs on later ones of 8.x; from 9.0 on it uses what only one capability has.
    """
    fit = [
        target.capability
        for target in TARGETS.values()
        if target.capability == capability
        or (target.capability // 10 == 8 == capability // 10 and target.capability < capability)
    ]
    return f"SM{max(fit)}" if fit else None
