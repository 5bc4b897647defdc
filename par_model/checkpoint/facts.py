"""The number of heads and the token grid, which the shapes of the weights do not show, and where each comes from.

Files of ``parvis train`` contain both. Other files may hold a rotary table (``freqs_cis``) or a cache (``kv_cache``)
that they follow from, or the arguments of their training. Otherwise the named sizes decide, and the grid is reported
as assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from par_model.checkpoint.errors import CheckpointError
from par_model.config import SIZES

Grid = tuple[int, int, int]
PUBLISHED_GRID: Grid = (1, 24, 24)
DOWNSAMPLING = 16  #: of the published tokenizer, for arguments with an image size only
GPT = "GPT-"  #: begins the published code's name of a size: "GPT-XL"


@dataclass(frozen=True)
class Fact:
    """A value of the model, and where it comes from, in words."""

    value: Any
    source: str


@dataclass(frozen=True)
class Sizes:
    """The sizes that the shapes of the weights show."""

    dim: int
    n_layers: int
    vocab_size: int
    n_classes: int
    group_size: int

    @property
    def name(self) -> str | None:
        """The name of the named size with this width and depth; None where there is none."""
        return next((name for name, size in SIZES.items() if size[:2] == (self.dim, self.n_layers)), None)


def whole(value: object) -> int | None:
    """``value`` as a positive whole number; None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def heads(
    path: Path, sizes: Sizes, saved: Mapping[str, Any], args: Mapping[str, Any], left: Mapping[str, Any]
) -> Fact | None:
    """The number of attention heads; None where it follows from nothing. Raises CheckpointError for contradictions.

    ``saved``: the config of ``parvis train``; ``args``: the arguments of a training; ``left``: key -> shape of the
    buffers that the published code saves with its weights.
    """
    facts = []
    if "n_heads" in saved:
        if (count := whole(saved["n_heads"])) is None:
            raise CheckpointError(f"{path}: its config says n_heads={saved['n_heads']!r}; expected a whole number")
        facts.append(Fact(count, "the file's config"))
    if (table := _rotary(left)) is not None:
        size = 2 * table[1]
        if sizes.dim % size:
            raise CheckpointError(
                f"{path}: its freqs_cis {table} is for heads of {size}, which the width {sizes.dim} is no multiple "
                "of; save the state dict without it, and give --heads"
            )
        facts.append(Fact(sizes.dim // size, f"the file's freqs_cis {table}"))
    caches = sorted(key for key, shape in left.items() if key.endswith("k_cache") and len(shape) == 4)
    if caches and (count := whole(left[caches[0]][1])):
        facts.append(Fact(count, f"the file's {caches[0]} {left[caches[0]]}"))
    if sizes.name and _gpt_name(args) == sizes.name:
        facts.append(Fact(SIZES[sizes.name][2], f"the file's args: gpt_model {args['gpt_model']}"))
    if not facts and sizes.name:
        facts.append(Fact(SIZES[sizes.name][2], f"size {sizes.name}"))
    return _agreed(path, "heads", facts, str, "--heads")


def grid(
    path: Path, sizes: Sizes, saved: Mapping[str, Any], args: Mapping[str, Any], left: Mapping[str, Any]
) -> Fact | None:
    """The token grid (T, H, W); None where it follows from nothing.

    Arguments and errors are those of :func:`heads`.
    """
    facts = []
    if "grid" in saved:
        given = saved["grid"]
        sides = [whole(side) for side in given] if isinstance(given, (list, tuple)) else []
        if len(sides) != 3 or None in sides:
            raise CheckpointError(f"{path}: its config says grid={given!r}; expected three whole numbers T, H, W")
        facts.append(Fact(tuple(sides), "the file's config"))
    if (table := _rotary(left)) is not None and (side := _side(table[0], sizes.group_size)):
        facts.append(Fact((1, side, side), f"the file's freqs_cis {table}"))
    if pixels := whole(args.get("image_size")):
        down = whole(args.get("downsample_size")) or DOWNSAMPLING
        if pixels >= down:
            facts.append(Fact((1, pixels // down, pixels // down), f"the file's args: image_size {pixels} / {down}"))
    # "tiny" is ours and comes in any grid; the published sizes are all 384 px models.
    if not facts and sizes.name not in (None, "tiny"):
        facts.append(Fact(PUBLISHED_GRID, "assumed: 384 px; --grid 16 for 256 px"))
    return _agreed(path, "grid", facts, grid_text, "--grid")


def check_args(path: Path, sizes: Sizes, args: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the arguments of a training do not fit the weights beside them."""
    name = _gpt_name(args)
    wrong = []
    if name in SIZES and SIZES[name][:2] != (sizes.dim, sizes.n_layers):
        wrong.append(
            f"gpt_model {args['gpt_model']} (width {SIZES[name][0]}, {SIZES[name][1]} layers), the weights have width "
            f"{sizes.dim} and {sizes.n_layers} layers"
        )
    for key, have, what in (
        ("vocab_size", sizes.vocab_size, "codes"),
        ("num_classes", sizes.n_classes, "classes and one row for no class"),
    ):
        if (value := whole(args.get(key))) and value != have:
            wrong.append(f"{key} {value}, the weights have {have} {what}")
    if wrong:
        raise CheckpointError(
            f"{path}: its args say {' and '.join(wrong)}; give the file of one training, or the state dict alone"
        )


def downsampling(args: Mapping[str, Any]) -> int | None:
    """Pixels per token in each direction by the arguments of a training; None where they do not contain it."""
    return whole(args.get("downsample_size"))


def grid_text(value: Sequence[int]) -> str:
    """A grid (T, H, W) as text: "1x24x24"."""
    return "x".join(map(str, value))


def _agreed(path: Path, what: str, facts: list[Fact], text: Any, option: str) -> Fact | None:
    """The first of ``facts``; None without any. Raises CheckpointError where their values differ."""
    for other in facts[1:]:
        if other.value != facts[0].value:
            raise CheckpointError(
                f"{path}: contradicts itself: {what} {text(facts[0].value)} by {facts[0].source}, {text(other.value)} "
                f"by {other.source}; give {option} to settle it"
            )
    return facts[0] if facts else None


def _rotary(left: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape (rows, D/2, 2) of the published code's rotary table; None where the file has no such table."""
    shape = left.get("freqs_cis")
    return tuple(shape) if shape is not None and len(shape) == 3 and shape[2] == 2 and 0 not in shape else None


def _side(rows: int, n: int) -> int | None:
    """The side L of a square grid, by the ``rows`` of a rotary table; None where no L fits.

    The table has a row for each of L*L tokens, one for the class, and in some files n-1 for the learnable tokens.
    """
    for extra in (1, n):
        side = math.isqrt(max(rows - extra, 0))
        if side and side * side == rows - extra and side % math.isqrt(n) == 0:
            return side
    return None


def _gpt_name(args: Mapping[str, Any]) -> str | None:
    name = args.get("gpt_model")
    return name.removeprefix(GPT) if isinstance(name, str) and name.startswith(GPT) else None
