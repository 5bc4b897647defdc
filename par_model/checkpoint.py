"""Published checkpoint files to our state dict: every key accounted for, nothing in a pickle ever run.

The weights are the whole file (a bare dict) or lie under ``model``, ``module`` or ``state_dict``, in that
order, never ``ema`` (spec, 6). What wrappers put before or between names (DDP, FSDP, torch.compile) is taken off.
Files are read memory-mapped: a tensor costs memory when it is asked for. Which file, and in which format:
``checkpoint_file.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_model.checkpoint_file import CheckpointError as CheckpointError  # part of this module
from par_model.checkpoint_file import read as _read
from par_model.config import SIZES, PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel

#: Leftovers of old files, recomputed here. Any other extra key is refused.
DROPPED = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")
NESTED_UNDER = ("model", "module", "state_dict")
PUBLISHED_GRID = (1, 24, 24)
#: What wrappers of a model put into its keys: DDP in front, torch.compile, FSDP and activation checkpointing anywhere.
WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Fields that no shape shows: a file of ours that was trained with an ablation says so.
ABLATIONS = ("order", "sequential_initial", "causal_groups")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, by key, and what the file says of itself (only files of ``parvis train`` do)."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None

    def tensor(self, key: str) -> Tensor:
        """The tensor of ``key``, mapped from the file, in the file's dtype."""
        return self.tensors[key]

    def release(self) -> None:
        """Give the memory of mapped tensors back; they are mapped again when asked for. Holders of one keep it."""
        if isinstance(self.tensors, _MappedTensors):
            self.tensors.release()


class _MappedTensors(Mapping[str, Tensor]):
    """Tensors mapped from a file when asked for; ``release`` gives the mapping, and with it the memory, back."""

    def __init__(self, load: Callable[[], dict[str, Tensor]]) -> None:
        self._load = load
        self._mapped: dict[str, Tensor] | None = load()
        self._keys = tuple(self._mapped)

    def __getitem__(self, key: str) -> Tensor:
        if self._mapped is None:
            self._mapped = self._load()
        return self._mapped[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def release(self) -> None:
        self._mapped = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Map the checkpoint at ``path``. Raises CheckpointError if it is not one."""
    path = Path(path)
    content = _read(path)
    weights = _weights(content)
    others = [k for k, v in weights.items() if not isinstance(v, Tensor)]
    if others or not weights:
        raise CheckpointError(
            f"{path}: expected tensors by name, at the top or under {', '.join(NESTED_UNDER)}; found "
            f"{', '.join(map(str, others[:5])) or 'nothing'}"
        )
    config = content.get("config") if weights is not content else None
    names = content.get("class_names") if weights is not content else None

    keys = plain_keys(path, weights)

    def tensors() -> dict[str, Tensor]:
        return {keys[k]: v for k, v in _weights(_read(path)).items() if not DROPPED.fullmatch(keys[k])}

    del content, weights
    return Checkpoint(
        path,
        _MappedTensors(tensors),
        dict(config) if isinstance(config, Mapping) else {},
        list(names) if names else None,
    )


def plain_keys(path: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Key of the file -> key of the model. Raises CheckpointError where two become one."""
    keys = {key: WRAPPERS.sub("", WRAPPERS.sub("", key)) for key in weights}
    taken: dict[str, str] = {}
    for key, plain in keys.items():
        if plain in taken:
            raise CheckpointError(
                f"{path}: keys {taken[plain]!r} and {key!r} are both {plain!r} without what wrappers added; save the "
                "state dict of one model"
            )
        taken[plain] = key
    return keys


def _weights(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((content[k] for k in NESTED_UNDER if isinstance(content.get(k), Mapping)), content)


def par_config(
    checkpoint: Checkpoint, *, heads: int | None = None, grid: tuple[int, int, int] | None = None
) -> PARConfig:
    """The config of a PAR checkpoint: sizes and n from the shapes; ``heads`` and ``grid`` where they are not settled.

    Raises CheckpointError if the shapes leave something open, or if keys or shapes do not fit.
    """
    path, have = checkpoint.path, checkpoint.tensors
    for key in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
        if key not in have:
            hint = (
                " (this is an image tokenizer: give it as --tokenizer)" if "quantize.embedding.weight" in have else ""
            )
            raise CheckpointError(f"{path}: no key {key!r}; expected a PAR or LlamaGen state dict{hint}")
    vocab, dim = _shape(path, have, "tok_embeddings.weight", 2)
    rows, _ = _shape(path, have, "cls_embedding.embedding_table.weight", 2)
    special = "spe_tok_embeddings.special_embeddings.weight"
    layers = {int(m.group(1)) for key in have if (m := re.match(r"layers\.(\d+)\.", key))}
    n_layers = max(layers) + 1 if layers else 0
    saved = checkpoint.config
    named = {(d, n): h for d, n, h in SIZES.values()}
    if heads is None:
        heads = saved.get("n_heads") or named.get((dim, n_layers))
    if heads is None:
        raise CheckpointError(
            f"{path}: width {dim} with {n_layers} layers is none of the named sizes ({', '.join(SIZES)}), and the "
            "number of attention heads cannot be read from shapes; give --heads"
        )
    if grid is None:
        # "tiny" is ours and comes in any grid; the published sizes are all 384 px models.
        published = (dim, n_layers) in named and (dim, n_layers) != SIZES["tiny"][:2]
        grid = saved.get("grid") or (PUBLISHED_GRID if published else None)
    if grid is None:
        raise CheckpointError(
            f"{path}: the token grid cannot be read from shapes; give --grid (24 for 384 px, 16 for 256 px)"
        )
    try:
        config = PARConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=heads,
            vocab_size=vocab,
            n_classes=rows - 1,
            grid=grid,
            group_size=_shape(path, have, special, 2)[0] + 1 if special in have else 1,
            **{name: saved[name] for name in ABLATIONS if name in saved},
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        expected = PAR(config).state_dict()
    check_keys(path, have, expected)
    return config


def vq_config(checkpoint: Checkpoint) -> VQConfig:
    """The config of a tokenizer checkpoint, from its shapes. Raises CheckpointError if they do not fit."""
    path, have = checkpoint.path, checkpoint.tensors
    first = "encoder.conv_blocks.0.res.0.conv2.weight"
    for key in ("quantize.embedding.weight", "encoder.conv_in.weight", "post_quant_conv.weight", first):
        if key not in have:
            hint = " (this is a PAR model: give it as --checkpoint)" if "tok_embeddings.weight" in have else ""
            raise CheckpointError(f"{path}: no key {key!r}; expected a VQ tokenizer state dict{hint}")
    channels = _shape(path, have, "encoder.conv_in.weight", 4)[0]
    widths: list[int] = []
    while (key := f"encoder.conv_blocks.{len(widths)}.res.0.conv2.weight") in have:
        widths.append(_shape(path, have, key, 4)[0])
    blocks = len({key.split(".")[4] for key in have if key.startswith("encoder.conv_blocks.0.res.")})
    size, dim = _shape(path, have, "quantize.embedding.weight", 2)
    try:
        config = VQConfig(
            codebook_size=size,
            codebook_dim=dim,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            res_blocks=blocks,
            z_channels=_shape(path, have, "post_quant_conv.weight", 4)[0],
            norm_groups=checkpoint.config.get("norm_groups", 32),
        )
        with torch.device("meta"):
            expected = VQModel(config).state_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_keys(path, have, expected)
    return config


def _shape(path: Path, have: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of ``key``. Raises CheckpointError unless it has so many dimensions, none of them empty."""
    shape = tuple(have[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{path}: {key} has shape {shape}; expected {dimensions} dimensions, none of them empty")
    return shape


def check_keys(path: Path, have: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless ``have`` holds exactly the keys and shapes of ``expected``."""
    missing = [key for key in expected if key not in have]
    extra = [key for key in have if key not in expected]
    if missing or extra:
        parts = [
            f"{len(keys)} {what} ({_some(keys)})" for what, keys in (("missing", missing), ("unknown", extra)) if keys
        ]
        raise CheckpointError(
            f"{path}: keys do not fit: {', '.join(parts)}; expected exactly the {len(expected)} keys of the architecture"
        )
    for key, tensor in expected.items():
        if have[key].shape != tensor.shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(have[key].shape)}; expected {tuple(tensor.shape)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
