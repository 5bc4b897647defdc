"""A checkpoint to the configuration of its model or tokenizer: sizes from the shapes, and every key accounted for.

``facts.py`` finds the number of heads and the token grid, which shapes do not show.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from par_model.checkpoint import facts
from par_model.checkpoint.beside import read_beside
from par_model.checkpoint.errors import CheckpointError, shown, some
from par_model.checkpoint.keys import check_keys, missing, shape_of
from par_model.checkpoint.load import Checkpoint
from par_model.checkpoint.recognise import keys_problem
from par_model.config import ORDERS, SIZES, PARConfig, VQConfig
from par_model.shapes import without_weights
from par_model.transformer import PAR
from par_model.vq import VQModel

#: Options that no shape shows, and their values. A file of ``parvis train`` names those it was trained with.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "order": ORDERS,
    "sequential_initial": (True, False),
    "causal_groups": (False, True),
}
MOST_TOKENS = 2**16  # tables are made for each token; the published grids have 576 and 1280


@dataclass(frozen=True)
class Inferred:
    """The configuration of a model, and where its number of heads and its grid come from, in words."""

    config: PARConfig
    heads_from: str
    grid_from: str
    warnings: tuple[str, ...] = ()  #: sources that disagree with what is used, one line each


def par_config(checkpoint: Checkpoint, *, heads: int | None = None, grid: facts.Grid | None = None) -> PARConfig:
    """The configuration that :func:`infer` finds. Raises CheckpointError."""
    return infer(checkpoint, heads=heads, grid=grid).config


def infer(
    checkpoint: Checkpoint,
    *,
    heads: int | None = None,
    grid: facts.Grid | None = None,
    pixels_per_token: int | None = None,
) -> Inferred:
    """The configuration of a PAR checkpoint.

    Sizes and n follow from the shapes, heads and grid from what else is known (``facts.py`` has the order of trust).
    ``heads`` and ``grid`` (T, H, W) override the rest. ``pixels_per_token`` is the tokenizer's downsampling, for
    sources that name a number of pixels. Raises CheckpointError if heads and grid are needed and not given, if the
    file contradicts itself, or if keys or shapes do not fit.
    """
    path, saved = checkpoint.path, checkpoint.config
    sizes = _sizes(checkpoint)
    known = facts.Evidence(
        path,
        sizes,
        saved,
        checkpoint.args,
        checkpoint.args_under,
        checkpoint.left,
        read_beside(path),
        pixels_per_token,
    )
    facts.check_said(known, used=grid is None or (heads is None and sizes.name is None))
    heads_fact, grid_fact = facts.heads(known, heads), facts.grid(known, grid)
    grids = f"--grid ({_grids(known.pixels_per_token)})"
    if heads_fact is None:
        raise CheckpointError(
            f"{path}: width {sizes.dim} with {sizes.n_layers} layers is none of the named sizes ({', '.join(SIZES)}), "
            "and the number of attention heads cannot be read from shapes; give --heads"
            + (f", and {grids}: the token grid cannot be read either" if grid_fact is None else "")
        )
    if grid_fact is None:
        raise CheckpointError(f"{path}: the token grid cannot be read from shapes; give {grids}")
    if math.prod(grid_fact.value) > MOST_TOKENS:
        raise CheckpointError(
            f"{path}: a grid of {facts.grid_text(grid_fact.value)} ({grid_fact.source}) has more than {MOST_TOKENS} "
            "tokens; give another --grid"
        )
    ablations = {name: saved[name] for name in ABLATIONS if name in saved}
    for name, value in ablations.items():
        if value not in ABLATIONS[name] or type(value) is not type(ABLATIONS[name][0]):
            raise CheckpointError(f"{path}: its config says {name}={shown(value)}; expected one of {ABLATIONS[name]}")
    try:
        config = PARConfig(
            dim=sizes.dim,
            n_layers=sizes.n_layers,
            n_heads=heads_fact.value,
            vocab_size=sizes.vocab_size,
            n_classes=sizes.n_classes,
            grid=grid_fact.value,
            group_size=sizes.group_size,
            **ablations,
        )
        expected = without_weights(PAR, config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_keys(path, checkpoint.tensors, expected)
    return Inferred(config, heads_fact.source, grid_fact.source, tuple(known.warnings))


def _grids(down: int) -> str:
    """The grids of the two usual image sizes, for a message."""
    fitting = [(pixels // down, pixels) for pixels in (384, 256) if pixels % down == 0]
    return ", ".join(f"{side} for {pixels} px" for side, pixels in fitting) or f"{down} pixels per token"


def _sizes(checkpoint: Checkpoint) -> facts.Sizes:
    """The sizes that the shapes show. Raises CheckpointError where the file is not that of a PAR model."""
    path, have = checkpoint.path, checkpoint.tensors
    if (why := keys_problem(have)) is not None:
        raise CheckpointError(f"{path}: {why}")
    for key in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
        if key not in have:
            raise missing(path, have, key, "par")
    vocab, dim = shape_of(path, have, "tok_embeddings.weight", 2)
    rows, _ = shape_of(path, have, "cls_embedding.embedding_table.weight", 2)
    special = "spe_tok_embeddings.special_embeddings.weight"
    layers = {int(m.group(1)) for key in have if (m := re.match(r"layers\.([0-9]{1,4})\.", key))}
    n_layers = max(layers) + 1 if layers else 0
    if n_layers != len(layers) or not layers:  # before a model with so many layers is made
        raise CheckpointError(
            f"{path}: holds layers {some([str(i) for i in sorted(layers)]) or 'none'}; expected layers.0 and on "
            "without a gap"
        )
    n = shape_of(path, have, special, 2)[0] + 1 if special in have else 1
    return facts.Sizes(dim, n_layers, vocab, rows - 1, n)


def vq_config(checkpoint: Checkpoint) -> VQConfig:
    """The configuration of a tokenizer checkpoint, from its shapes. Raises CheckpointError if they do not fit."""
    path, have = checkpoint.path, checkpoint.tensors
    first = "encoder.conv_blocks.0.res.0.conv2.weight"
    if (why := keys_problem(have)) is not None:
        raise CheckpointError(f"{path}: {why}")
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "post_quant_conv.weight", first):
        if key not in have:
            raise missing(path, have, key, "vq")
    for said, source in ((checkpoint.args, "its args say"), (checkpoint.config, "its config says")):
        if said.get("codebook_l2_norm") is False:
            raise CheckpointError(
                f"{path}: {source} codebook_l2_norm False; parvis runs tokenizers with normalised codes only, as the "
                "published ones have them"
            )
    channels = shape_of(path, have, "encoder.conv_in.weight", 4)[0]
    widths: list[int] = []
    while (key := f"encoder.conv_blocks.{len(widths)}.res.0.conv2.weight") in have:
        widths.append(shape_of(path, have, key, 4)[0])
    blocks = len({key.split(".")[4] for key in have if key.startswith("encoder.conv_blocks.0.res.")})
    size, dim = shape_of(path, have, "quantize.embedding.weight", 2)
    for key, shape in (("codebook_size", size), ("codebook_embed_dim", dim)):
        if (value := facts.whole(checkpoint.args.get(key))) and value != shape:
            raise CheckpointError(
                f"{path}: its args say {key} {shown(value)}, the weights have {shape}; give the file of one training, "
                "or the state dict alone"
            )
    groups = checkpoint.config.get("norm_groups", 32)
    if facts.whole(groups) is None:
        raise CheckpointError(f"{path}: its config says norm_groups={shown(groups)}; expected a whole number")
    try:
        config = VQConfig(
            codebook_size=size,
            codebook_dim=dim,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            res_blocks=blocks,
            z_channels=shape_of(path, have, "post_quant_conv.weight", 4)[0],
            norm_groups=groups,
        )
        expected = without_weights(VQModel, config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_keys(path, have, expected)
    return config
