"""The number of heads and the token grid, which the shapes of the weights do not show, and where each comes from.

Sources, in the order of trust:

1. the caller's options;
2. the file: the config of ``parvis train``, a rotary table (``freqs_cis``) or a cache (``kv_cache``) that old files
   hold, the arguments of a training. Two of these that disagree are an error, as nothing says which one is wrong;
3. ``config.json`` beside the file;
4. the file's name, where it has a number of pixels: ``c2i_B_256.pt``;
5. the named sizes: heads by the table, and 384 px, which is reported as assumed; 17 frames of 128x128 for the video
   model, by its 64,000 codes.

A source that disagrees with one of more trust is reported as a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from par_model.checkpoint.errors import CheckpointError, shown
from par_model.config import NORM_EPS, ROPE_BASE, SIZES, VIDEO_CODES, VIDEO_GRID

Grid = tuple[int, int, int]
PUBLISHED_PIXELS = 384
PUBLISHED_GRID: Grid = (1, 24, 24)
DOWNSAMPLING = 16  #: of the published tokenizer, for sources that name a number of pixels only
GPT = "GPT-"  #: begins the published code's name of a size: "GPT-XL"
#: Further sizes of the published code, for a training's ``gpt_model``: name -> (d, layers, heads).
PUBLISHED_SIZES = SIZES | {"1B": (2048, 22, 32), "XXXL": (2560, 48, 40), "7B": (4096, 32, 32)}
NAMED_PIXELS = (256, 384, 512)  #: that a file's name may have
#: Names of files that do not name the model; their folder may.
PLAIN_NAMES = ("model", "pytorch_model", "consolidated", "checkpoint")


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
        """The name of the named size with this width and depth; None where there is none.

        The video model's widths are not published, so only its codes tell that a model is meant to be it.
        """
        found = next((name for name, size in SIZES.items() if size[:2] == (self.dim, self.n_layers)), None)
        return None if found == "video" and self.vocab_size != VIDEO_CODES else found


@dataclass
class Evidence:
    """All that is known of a file beside the weights themselves."""

    path: Path
    sizes: Sizes
    saved: Mapping[str, Any]  #: the config of ``parvis train``
    args: Mapping[str, Any]  #: the arguments of a training
    args_under: str  #: the name under which the file holds them
    left: Mapping[str, tuple[int, ...]]  #: key -> shape of the buffers that the published code saves with its weights
    beside: Mapping[str, Any]  #: the values of ``config.json``, by the published code's names
    downsampling: int | None = None  #: pixels per token of the tokenizer, where it is known
    warnings: list[str] = field(default_factory=list)

    @property
    def pixels_per_token(self) -> int:
        """For sources that name a number of pixels only."""
        return whole(self.args.get("downsample_size")) or self.downsampling or DOWNSAMPLING


def whole(value: object) -> int | None:
    """``value`` as a positive whole number; None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def heads(known: Evidence, given: int | None) -> Fact | None:
    """The number of attention heads; ``given`` is the caller's option. None where it follows from nothing.

    Raises CheckpointError for contradictions in the file.
    """
    sizes = known.sizes
    weaker = []
    if count := whole(known.beside.get("n_head")):
        weaker.append(Fact(count, "config.json beside the file"))
    fact = _settled(known, "heads", given, _heads_of_file, weaker, str, "--heads")
    if fact is None and sizes.name:
        ours = ", assumed: its widths are not published" if sizes.name == "video" else ""
        return Fact(SIZES[sizes.name][2], f"size {sizes.name}{ours}")
    return fact


def grid(known: Evidence, given: Grid | None) -> Fact | None:
    """The token grid (T, H, W); arguments and errors are those of :func:`heads`."""
    weaker = [*_grid_beside(known), *_grid_of_name(known)]
    fact = _settled(known, "grid", given, _grid_of_file, weaker, grid_text, "--grid")
    if fact is None and known.sizes.name == "video":
        return Fact(VIDEO_GRID, "assumed: 17 frames of 128x128, as published")
    # "tiny" is ours and comes in any grid; the published sizes are all 384 px models, of the published tokenizer.
    if fact is None and known.sizes.name not in (None, "tiny") and known.pixels_per_token == DOWNSAMPLING:
        return Fact(PUBLISHED_GRID, f"assumed: {PUBLISHED_PIXELS} px; --grid 16 for 256 px")
    return fact


def _heads_of_file(known: Evidence) -> list[Fact]:
    path, sizes, saved = known.path, known.sizes, known.saved
    facts = []
    if "n_heads" in saved:
        if (count := whole(saved["n_heads"])) is None:
            raise CheckpointError(f"{path}: its config says n_heads={shown(saved['n_heads'])}; expected a whole number")
        facts.append(Fact(count, "the file's config"))
    if (table := _rotary(known.left)) is not None:
        size = 2 * table[1]
        if sizes.dim % size:
            raise CheckpointError(
                f"{path}: its freqs_cis {table} is for heads of {size}, which the width {sizes.dim} is no multiple "
                "of; save the state dict without it, and give --heads"
            )
        facts.append(Fact(sizes.dim // size, f"the file's freqs_cis {table}"))
    caches = sorted(key for key, shape in known.left.items() if key.endswith("k_cache") and len(shape) == 4)
    if caches and (count := whole(known.left[caches[0]][1])):
        facts.append(Fact(count, f"the file's {caches[0]} {known.left[caches[0]]}"))
    name = _gpt_name(known.args)
    if name in PUBLISHED_SIZES and PUBLISHED_SIZES[name][:2] == (sizes.dim, sizes.n_layers):
        facts.append(
            Fact(PUBLISHED_SIZES[name][2], f"the file's {known.args_under}: gpt_model {known.args['gpt_model']}")
        )
    elif count := whole(known.args.get("n_head")):
        facts.append(Fact(count, f"the file's {known.args_under}: n_head"))
    return facts


def _grid_of_file(known: Evidence) -> list[Fact]:
    facts = []
    if "grid" in known.saved:
        given = known.saved["grid"]
        sides = [whole(side) for side in given] if isinstance(given, (list, tuple)) else []
        if len(sides) != 3 or None in sides:
            raise CheckpointError(
                f"{known.path}: its config says grid={shown(given)}; expected three whole numbers T, H, W"
            )
        facts.append(Fact(tuple(sides), "the file's config"))
    n = known.sizes.group_size
    if (table := _rotary(known.left)) is not None and (side := _side(table[0], n, (1, n))):
        facts.append(Fact((1, side, side), f"the file's freqs_cis {table}"))
    facts += _grid_of_pixels(known.args, known.pixels_per_token, f"the file's {known.args_under}")
    if (tokens := whole(known.args.get("block_size"))) and (side := _side(tokens, n, (0, n - 1))):
        facts.append(Fact((1, side, side), f"the file's {known.args_under}: block_size {tokens}"))
    return facts


def _grid_beside(known: Evidence) -> list[Fact]:
    beside, n = known.beside, known.sizes.group_size
    source = "config.json beside the file"
    given = beside.get("grid")
    sides = [whole(side) for side in given] if isinstance(given, list) and 2 <= len(given) <= 3 else []
    facts = []
    if sides and None not in sides:
        facts.append(Fact(tuple(sides) if len(sides) == 3 else (1, *sides), f"{source}: grid {shown(given)}"))
    if tokens := whole(beside.get("block_size")):
        if side := _side(tokens, n, (0, n - 1)):
            facts.append(Fact((1, side, side), f"{source}: block_size {tokens}"))
        else:
            known.warnings.append(f"{source}: block_size {tokens} is no square grid for n = {n}; it is not used")
    down = whole(beside.get("downsample_size")) or known.pixels_per_token
    return facts + _grid_of_pixels(beside, down, source)


def _grid_of_pixels(values: Mapping[str, Any], down: int, source: str) -> list[Fact]:
    pixels = whole(values.get("image_size"))
    if not pixels or pixels < down:
        return []
    return [Fact((1, pixels // down, pixels // down), f"{source}: image_size {pixels} / {down}")]


def _grid_of_name(known: Evidence) -> list[Fact]:
    """The grid by a number of pixels in the file's name, as the published files have it (``c2i_B_256.pt``)."""
    path, down = known.path, known.pixels_per_token
    name = path.parent.name if path.stem in PLAIN_NAMES and not path.is_dir() else path.name
    parts = re.split(r"[^0-9A-Za-z]+", name)
    found = set()
    for before, part in zip(["", *parts], parts, strict=False):
        match = re.fullmatch(r"(\d{3})(?:px|p|x\1)?", part)
        counts = re.search(r"(?i)(step|iter|epoch|ep|ckpt|checkpoint)s?$", before)
        if match and int(match.group(1)) in NAMED_PIXELS and not counts:
            found.add(int(match.group(1)))
    if len(found) != 1:
        return []
    pixels = found.pop()
    side = pixels // down
    if pixels % down or side % math.isqrt(known.sizes.group_size):
        return []
    return [Fact((1, side, side), f"the name {name[:80]}: {pixels} px / {down}")]


def _settled(
    known: Evidence,
    what: str,
    given: Any,
    of_file: Callable[[Evidence], list[Fact]],
    weaker: list[Fact],
    text: Callable[[Any], str],
    option: str,
) -> Fact | None:
    """The fact of most trust; None without any. Others that disagree are reported, those of one file are an error."""
    facts: list[Fact] = []
    try:
        facts = of_file(known)
        for other in facts[1:] if given is None else []:
            if other.value != facts[0].value:
                raise CheckpointError(
                    f"{known.path}: contradicts itself: {what} {text(facts[0].value)} by {facts[0].source}, "
                    f"{text(other.value)} by {other.source}; give {option} to settle it"
                )
    except CheckpointError as error:
        if given is None:
            raise
        known.warnings.append(f"{option} is used although {str(error).removeprefix(f'{known.path}: ')}")
    if given is not None:
        facts = [Fact(given, option), *facts]
    facts += weaker
    if not facts:
        return None
    if other_facts := [other for other in facts[1:] if other.value != facts[0].value]:
        said = ", ".join(f"{text(other.value)} by {other.source}" for other in other_facts[:2])
        known.warnings.append(f"{what} {text(facts[0].value)} by {facts[0].source}, which is used, but {said}")
    return facts[0]


# --- what the arguments of a training, or config.json, say against the weights ----------------------------------------


def check_said(known: Evidence, *, used: bool) -> None:
    """Raise CheckpointError where arguments of a training, or ``config.json``, do not fit the weights beside them.

    ``used`` False: nothing is taken from the arguments, since the caller's options settle all, so that sizes in them
    that do not fit are a warning. A ``config.json`` of other sizes belongs to another model: it is not used.
    """
    path = known.path
    _refuse_unknown_forms(path, known.sizes, known.args, f"its {known.args_under} say")
    if wrong := _other_sizes(known.sizes, known.args):
        text = f"its {known.args_under} say {' and '.join(wrong)}"
        if used:
            raise CheckpointError(
                f"{path}: {text}; give the file of one training, or the state dict alone, or --heads and --grid, which "
                "then count instead"
            )
        known.warnings.append(f"{text}; --grid is used, and the sizes of the weights")
    wrong = _other_sizes(known.sizes, known.beside)
    if wrong and not _no_row_for_no_class(known.sizes, known.beside):
        known.warnings.append(f"config.json beside the file is of another model, and not used: {' and '.join(wrong)}")
        known.beside = {}
    _refuse_unknown_forms(path, known.sizes, known.beside, "config.json beside it says")


def _other_sizes(sizes: Sizes, said: Mapping[str, Any]) -> list[str]:
    """What ``said`` says about sizes that the weights do not have."""
    wrong = []
    name = _gpt_name(said)
    if name in PUBLISHED_SIZES and PUBLISHED_SIZES[name][:2] != (sizes.dim, sizes.n_layers):
        dim, layers, _ = PUBLISHED_SIZES[name]
        wrong.append(
            f"gpt_model {said['gpt_model']} (width {dim}, {layers} layers), the weights have width {sizes.dim} and "
            f"{sizes.n_layers} layers"
        )
    for key, have, what in (
        ("dim", sizes.dim, "as width"),
        ("n_layer", sizes.n_layers, "layers"),
        ("vocab_size", sizes.vocab_size, "codes"),
        ("num_classes", sizes.n_classes, "classes and one row for no class"),
    ):
        if (value := whole(said.get(key))) and value != have:
            wrong.append(f"{key} {shown(value)}, the weights have {have} {what}")
    return wrong


def _no_row_for_no_class(sizes: Sizes, said: Mapping[str, Any]) -> bool:
    """Whether ``said`` has as many classes as the table has rows, and no other size that does not fit."""
    rows = sizes.n_classes + 1
    return whole(said.get("num_classes")) == rows and not _other_sizes(sizes, {**said, "num_classes": 0})


def _refuse_unknown_forms(path: Path, sizes: Sizes, said: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError for options of a training that no shape shows and that this package does not run."""
    n = sizes.group_size
    if _no_row_for_no_class(sizes, said):
        raise CheckpointError(
            f"{path}: {source} num_classes {sizes.n_classes + 1}, the weights have {sizes.n_classes} classes and one "
            "row for no class: a training without class dropout (class_dropout_prob 0) has no such row; train with "
            "class dropout, which guidance needs"
        )
    learnable, group = said.get("spe_token_num"), said.get("ar_token_num")
    learnable = learnable if type(learnable) is int else None
    group = group if type(group) is int else None
    if group is not None and learnable is not None and group != learnable + 1:
        raise CheckpointError(
            f"{path}: {source} spe_token_num {learnable} and ar_token_num {group}, which contradict each other: tokens "
            f"in the order for groups of {group} need {group - 1} learnable tokens, {learnable} of them make groups of "
            f"{learnable + 1}; parvis runs models with ar_token_num = spe_token_num + 1: train with --spe-token-num "
            f"{max(group - 1, 0)} or --ar-token-num {learnable + 1} (if only the args are wrong, give the state dict "
            "alone)"
        )
    for name, value, have in (("spe_token_num", learnable, n - 1), ("ar_token_num", group, n)):
        if value is not None and value != have:
            raise CheckpointError(
                f"{path}: {source} {name} {value}, the weights hold {n - 1} learnable tokens, so {name} {have}; "
                "give the file of one training, or the state dict alone"
            )
    if said.get("gpt_type") == "t2i":
        raise CheckpointError(
            f"{path}: {source} gpt_type t2i, a text-to-image model; parvis runs class-conditional models: give one "
            "trained with --gpt-type c2i"
        )
    for name, only in (("cls_token_num", 1.0), ("rope_base", ROPE_BASE), ("norm_eps", NORM_EPS)):
        value = said.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value != only:
            raise CheckpointError(
                f"{path}: {source} {name} {shown(value)}; parvis runs models with {name} {only:g} only, as all "
                "published ones have it (if what it says is wrong, give the state dict alone)"
            )


def downsampling(args: Mapping[str, Any]) -> int | None:
    """Pixels per token in each direction by the arguments of a training; None where they do not contain it."""
    return whole(args.get("downsample_size"))


def grid_text(value: Sequence[int]) -> str:
    """A grid (T, H, W) as text: "1x24x24"."""
    return "x".join(map(str, value))


def _rotary(left: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape (rows, D/2, 2) of the published code's rotary table; None where the file has no such table."""
    shape = left.get("freqs_cis")
    return tuple(shape) if shape is not None and len(shape) == 3 and shape[2] == 2 and 0 not in shape else None


def _side(count: int, n: int, extras: tuple[int, ...]) -> int | None:
    """The side L of a square grid of L*L tokens, where ``count`` is that and one of ``extras``; None where no L fits.

    A rotary table has a row for each token, one for the class, and in some files n-1 for the learnable tokens.
    """
    for extra in extras:
        side = math.isqrt(max(count - extra, 0))
        if side and side * side == count - extra and side % math.isqrt(n) == 0:
            return side
    return None


def _gpt_name(args: Mapping[str, Any]) -> str | None:
    name = args.get("gpt_model")
    return name.removeprefix(GPT) if isinstance(name, str) and name.startswith(GPT) else None
