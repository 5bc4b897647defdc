"""Which matrices of a bundle are quantised, and in groups of how many rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from par_calibration.errors import CalibrationError
from par_export.quantised import can_quantise
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.checked import shown
from par_runtime.dtypes import DTYPE
from par_runtime.manifest import MATRICES
from par_runtime.quantised import GROUPS

HEAD = "output"
HEAD_NAME = "head"  #: how users name it
NOTHING = "none"
#: Rows that share a scale by default; docs/calibration.md has what 32, 64 and 128 cost.
GROUP = 64


@dataclass(frozen=True)
class How:
    """How a matrix is quantised."""

    dtype: str  #: "int8" or "int4"
    group: int
    stored: str  #: dtype of the scales

    @staticmethod
    def of(bundle: Bundle, dtype: str, group: int) -> How:
        """Scales are stored in the precision of ``bundle``."""
        return How(dtype, group, DTYPE[bundle.precision])


def kept_names(bundle: Bundle, keep: Sequence[str]) -> frozenset[str]:
    """The matrices that ``keep`` names: "head", a kind ("w2"), "layers.3", a whole name ("layers.3.w2"), or "none".

    Raises CalibrationError for what names no matrix.
    """
    names, layers = matrix_names(bundle), bundle.model["n_layers"]
    kept: set[str] = set()
    for entry in keep:
        if entry == NOTHING:
            continue
        if entry in (HEAD_NAME, HEAD):
            found = {HEAD}
        elif entry in MATRICES:
            found = {name for name in names if name.endswith(f".{entry}")}
        else:
            found = {name for name in names if name == entry or name.startswith(f"{entry}.")}
            found = found if re.fullmatch(r"layers\.\d+(\.\w+)?", entry) else set()
        if not found:
            raise CalibrationError(
                f"--keep {shown(entry)}: no such matrix; there are {HEAD_NAME}, {', '.join(MATRICES)} (of all layers), "
                f"layers.0 to layers.{layers - 1} (all of a layer), and names as layers.0.{MATRICES[0]}; "
                f"{NOTHING} keeps nothing"
            )
        kept |= found
    return frozenset(kept)


def check_groups(bundle: Bundle, how: How, kept: Collection[str]) -> None:
    """Raise CalibrationError where a matrix that is not kept has no whole groups of rows, or none is left."""
    shapes = {name: bundle.weights[name].shape for name in matrix_names(bundle) if name not in kept}
    if not shapes:
        raise CalibrationError(
            "--keep: keeps every matrix, so nothing would be quantised; keep fewer, or --weights keep"
        )
    if how.group not in GROUPS:
        raise CalibrationError(f"--group {how.group}: expected one of {', '.join(map(str, GROUPS))}")
    wrong = [name for name, shape in shapes.items() if not can_quantise(shape, how.dtype, how.group)]
    if not wrong:
        return
    k, n = shapes[wrong[0]]
    kinds = ",".join(dict.fromkeys(HEAD_NAME if name == HEAD else name.rpartition(".")[2] for name in wrong))
    fits = [g for g in GROUPS if all(can_quantise(shape, how.dtype, g) for shape in shapes.values())]
    other = f"--group {' or '.join(map(str, fits))} divides every matrix; " if fits else "no other --group does; "
    if how.dtype == "int4" and n % 2:
        raise CalibrationError(f"{wrong[0]} has {n} columns, and int4 needs an even number; give --keep {kinds}")
    raise CalibrationError(
        f"--group {how.group}: does not divide the {k} rows of {wrong[0]}; {other}or leave such matrices as they are "
        f"with --keep {kinds}"
    )
