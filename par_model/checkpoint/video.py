"""A checkpoint to the configuration of its video tokenizer: sizes from the shapes, and every key accounted for.

The published file is one of ``torch.save``, with the weights under ``model_state_dict`` and ``module.`` in front of
every key. What else it holds (``config`` as pickled bytes, a version) is not used, and the bytes are never unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from par_model.checkpoint import facts
from par_model.checkpoint.errors import CheckpointError, shown, some
from par_model.checkpoint.keys import check_keys, missing, shape_of
from par_model.checkpoint.load import Checkpoint
from par_model.checkpoint.recognise import OURS, architecture_problem, keys_problem
from par_model.config import VideoTokenizerConfig
from par_model.shapes import without_weights
from par_model.video import VideoTokenizer

KIND = "video-tokenizer"  #: what our own files say in their ``config``, under ``kind``
MOST_CODES = 2**24  #: of a codebook; every table with a row for each code can still be made
#: Channels in front of a depth-to-space, for each channel behind it -> the stride that it undoes.
STRIDES = {4: (1, 2, 2), 8: (2, 2, 2)}


def is_video(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of a video tokenizer of this layout, by their keys; nothing else is checked."""
    return OURS["video"].key in checkpoint.tensors


def video_config(checkpoint: Checkpoint) -> VideoTokenizerConfig:
    """The configuration of a video tokenizer checkpoint, from its shapes.

    The ``levels`` of FSQ and ``norm_groups`` do not show in shapes. They are what the file's own ``config`` says, else
    the published ones (levels 8, 8, 8, 5, 5, 5 where a code has 6 numbers; 32 groups).
    Raises CheckpointError where they are needed and not known, if the file contradicts itself, or if keys or shapes do
    not fit.
    """
    path, have, saved = checkpoint.path, checkpoint.tensors, checkpoint.config
    if (why := keys_problem(have)) is not None:
        raise CheckpointError(f"{path}: {why}")
    if not is_video(checkpoint):
        raise missing(path, have, OURS["video"].key, "video")
    if (why := architecture_problem(list(have))) is not None:
        raise CheckpointError(f"{path}: {why}")
    shape = _shape(path, have)
    try:
        config = VideoTokenizerConfig(
            levels=_levels(path, saved, shape.numbers),
            widths=shape.widths,
            strides=shape.strides,
            res_blocks=shape.res_blocks,
            last_blocks=shape.last_blocks,
            norm_groups=_norm_groups(path, saved, shape.widths),
        )
        expected = without_weights(VideoTokenizer, config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_keys(path, have, expected)
    if saved.get("kind") == KIND:
        shown_by_shapes = ["widths", "strides", "last_blocks"] + ["res_blocks"] * (len(config.widths) > 1)
        for name in shown_by_shapes:
            if name in saved and _tuples(saved[name]) != getattr(config, name):
                raise CheckpointError(
                    f"{path}: its config says {name}={shown(saved[name])}, the weights have "
                    f"{shown(getattr(config, name))}; give the file of one training, or the state dict alone"
                )
    return config


@dataclass(frozen=True)
class _Shape:
    """What the shapes of a file show."""

    numbers: int  #: of a code
    widths: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    res_blocks: int
    last_blocks: int


def _shape(path: Path, have: Mapping[str, Tensor]) -> _Shape:
    """Widths and blocks by the encoder's layers, strides by the decoder's. Raises CheckpointError."""
    encoder, decoder = _layers(have, "encoder_layers"), _layers(have, "decoder_layers")
    widths, blocks = [], []
    for key, units in groupby(encoder, key=lambda layer: layer[1] == "fn"):
        if key:
            run = list(units)
            widths.append(shape_of(path, have, f"encoder_layers.{run[-1][0]}.fn.2.conv.weight", 5)[0])
            blocks.append(len(run))
    codes = [f"encoder_layers.{i}.weight" for i, kind in encoder if kind == "weight"]
    ups = [f"decoder_layers.{i}.conv.weight" for i, kind in decoder if kind == "conv"][1:-1]
    if not widths or not codes or len(ups) != len(widths) - 1:
        raise CheckpointError(
            f"{path}: holds {len(widths)} levels of residual units in the encoder and {len(ups)} convolutions in front "
            "of a depth-to-space in the decoder; expected one less of these, as MAGVIT-v2's layout has it"
        )
    if len(set(blocks[:-1])) > 1:
        raise CheckpointError(
            f"{path}: its levels have {some(blocks, 8)} residual units; expected the same number in all but the last"
        )
    rates = []
    for key in reversed(ups):
        wide, width, *_ = shape_of(path, have, key, 5)
        if wide % width or wide // width not in STRIDES:
            raise CheckpointError(
                f"{path}: {key} makes {wide} channels of {width}; expected {some(STRIDES, 9)} times as many, which "
                "become frames and pixels"
            )
        rates.append(STRIDES[wide // width])
    default = VideoTokenizerConfig.res_blocks
    numbers = shape_of(path, have, codes[-1], 5)[0]
    return _Shape(numbers, tuple(widths), tuple(rates), blocks[0] if len(blocks) > 1 else default, blocks[-1])


def _layers(have: Mapping[str, Tensor], name: str) -> list[tuple[int, str]]:
    """Index and kind of each layer of the list ``name``, in order; the kind is the first weight's name in it."""
    kinds: dict[int, str] = {}
    for key in have:
        if (m := re.match(rf"{name}\.([0-9]{{1,4}})\.(fn|conv|beta|weight)\b", key)) is not None:
            index, kind = int(m.group(1)), m.group(2)
            kinds[index] = kind
    # A norm has a weight of one dimension, the last convolution of the encoder one of five.
    norms = [i for i, kind in kinds.items() if kind == "weight" and have[f"{name}.{i}.weight"].ndim == 1]
    return sorted((i, "norm" if i in norms else kind) for i, kind in kinds.items())


def _levels(path: Path, saved: Mapping[str, Any], numbers: int) -> tuple[int, ...]:
    """The levels of FSQ. Raises CheckpointError."""
    published = VideoTokenizerConfig().levels
    if "levels" not in saved:
        if numbers == len(published):
            return published
        raise CheckpointError(
            f"{path}: a code has {numbers} numbers, and how many values each of them has cannot be read from shapes; "
            + _save_with("levels", f"({numbers} numbers)")
        )
    levels = _tuples(saved["levels"])
    if (
        not isinstance(levels, tuple)
        or len(levels) != numbers
        or any((facts.whole(level) or 0) < 2 for level in levels)
        or prod(levels) > MOST_CODES
    ):
        raise CheckpointError(
            f"{path}: its config says levels={shown(levels)}; expected {numbers} whole numbers of at least 2, one for "
            f"each number of a code, whose product is at most {MOST_CODES}"
        )
    return levels


def _norm_groups(path: Path, saved: Mapping[str, Any], widths: tuple[int, ...]) -> int:
    """How many groups the norms have. Raises CheckpointError."""
    groups = saved.get("norm_groups", VideoTokenizerConfig.norm_groups)
    if facts.whole(groups) is None:
        raise CheckpointError(f"{path}: its config says norm_groups={shown(groups)}; expected a whole number")
    if "norm_groups" not in saved and any(width % groups for width in widths):
        raise CheckpointError(
            f"{path}: its widths ({some(widths, 8)}) are not multiples of {groups}, the groups of the published norms, "
            "and another number cannot be read from shapes; " + _save_with("norm_groups", "...")
        )
    return int(groups)


def _save_with(name: str, value: str) -> str:
    """The advice for a file that does not say ``name``."""
    return (
        f"save the file with it: torch.save({{'model': state_dict, 'config': {{'kind': {KIND!r}, {name!r}: {value}}}}}"
        ", path)"
    )


def _tuples(value: object) -> Any:
    """``value`` with tuples in the place of lists, as JSON has them."""
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value
