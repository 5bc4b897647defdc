"""Published checkpoint files to our state dict: every key accounted for, nothing in a pickle ever run.

The weights are the whole file (a bare dict) or lie under ``model``, ``module`` or ``state_dict``, in that
order, never ``ema`` (spec, 6). What wrappers put before or between names (DDP, FSDP, torch.compile) is taken off.
Files are read memory-mapped: a tensor costs memory when it is asked for. Which file, and in which format:
``checkpoint_file.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_model.checkpoint import facts
from par_model.checkpoint.file import CheckpointError as CheckpointError  # part of this module
from par_model.checkpoint.file import read as _read
from par_model.checkpoint.pickle import Arguments, plain
from par_model.config import SIZES, PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel

#: Leftovers of old files, recomputed here. Any other extra key is refused.
DROPPED = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")
NESTED_UNDER = ("model", "module", "state_dict")
#: A buffer of the tokenizer's training; it may be stored as any kind of number.
UNUSED = "quantize.codebook_used"
#: What wrappers of a model put into its keys: DDP in front, torch.compile, FSDP and activation checkpointing anywhere.
WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Fields that no shape shows: a file of ours that was trained with an ablation says so.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "order": ("distant", "raster"),
    "sequential_initial": (True, False),
    "causal_groups": (False, True),
}
MOST_TOKENS = 2**16  # tables are made for each; the published grids have 576 tokens and 1280
#: What weights may be stored as; all are read exactly or rounded as asked.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, by key, and what the file says beside them."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  #: only in files of ``parvis train``
    class_names: list[str] | None = None
    args: dict[str, Any] = field(default_factory=dict)  #: of a training by the published code
    left: dict[str, tuple[int, ...]] = field(default_factory=dict)  #: key -> shape of what :data:`DROPPED` drops

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
    """Map the checkpoint at ``path``. Raises CheckpointError if it is not one, OSError if it cannot be read."""
    path = Path(path)
    content = _read(path)
    weights = _weights(path, content)
    nested = any(isinstance(content.get(key), dict) for key in NESTED_UNDER)  # else the weights are the whole file
    config, names, args = (content.get(key) if nested else None for key in ("config", "class_names", "args"))
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: its class_names are not a list of names; give it without them")
    keys = plain_keys(path, weights)
    for key, value in weights.items():
        _check_tensor(path, key, value)
    left = {keys[key]: tuple(value.shape) for key, value in weights.items() if DROPPED.fullmatch(keys[key])}

    def tensors() -> dict[str, Tensor]:
        return {keys[k]: v for k, v in _weights(path, _read(path)).items() if not DROPPED.fullmatch(keys[k])}

    del content, weights
    return Checkpoint(
        path,
        _MappedTensors(tensors),
        plain(config),
        names or None,
        dict(args.values) if isinstance(args, Arguments) else plain(args),
        left,
    )


def plain_keys(path: Path, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Key of the file -> key of the model. Raises CheckpointError where two become one."""
    keys = {key: WRAPPERS.sub("", WRAPPERS.sub("", key)) for key in weights}
    taken: dict[str, str] = {}
    for key, short in keys.items():
        if short in taken:
            raise CheckpointError(
                f"{path}: keys {taken[short]!r} and {key!r} are both {short!r} without what wrappers added; save the "
                "state dict of one model"
            )
        taken[short] = key
    return keys


def _weights(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors by name: the whole file, or what lies under the first of :data:`NESTED_UNDER`. Raises CheckpointError.

    Each is a view without the attributes that a pickle may hang on a tensor.
    """
    weights = next((plain(content[k]) for k in NESTED_UNDER if isinstance(content.get(k), dict)), plain(content))
    others = [key for key, value in weights.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if others or not weights:
        named = ", ".join(
            other if isinstance(other, str) else f"a key of type {type(other).__name__}" for other in others[:5]
        )
        raise CheckpointError(
            f"{path}: expected tensors by name, at the top or under {', '.join(NESTED_UNDER)}; found {named or 'nothing'}"
        )
    return {key: Tensor.detach(value) for key, value in weights.items()}


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless ``tensor`` holds plain numbers, all of them in the file."""
    kind = None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "sparse, quantized or nested"
    elif tensor.device.type != "cpu":
        kind = f"a tensor on the device {tensor.device.type!r}, without numbers"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"of shape {tuple(tensor.shape)} but holds fewer numbers"
    if kind is not None:
        raise CheckpointError(f"{path}: {key} is {kind}; expected plain tensors: save model.state_dict() of the model")


@dataclass(frozen=True)
class Inferred:
    """A model's config, and from what its heads and grid follow, in words."""

    config: PARConfig
    heads_from: str
    grid_from: str


def par_config(checkpoint: Checkpoint, *, heads: int | None = None, grid: facts.Grid | None = None) -> PARConfig:
    """The config alone of :func:`infer`."""
    return infer(checkpoint, heads=heads, grid=grid).config


def infer(checkpoint: Checkpoint, *, heads: int | None = None, grid: facts.Grid | None = None) -> Inferred:
    """The config of a PAR checkpoint: sizes and n from the shapes, heads and grid from what the file says of itself.

    ``heads`` and ``grid`` win over the file. Raises CheckpointError if they are needed and not given, if the file
    contradicts itself, or if keys or shapes do not fit.
    """
    path, saved = checkpoint.path, checkpoint.config
    sizes = _sizes(checkpoint)
    said = (path, sizes, saved, checkpoint.args, checkpoint.left)
    facts.check_args(path, sizes, checkpoint.args)
    heads_fact = facts.heads(*said) if heads is None else facts.Fact(heads, "--heads")
    if heads_fact is None:
        raise CheckpointError(
            f"{path}: width {sizes.dim} with {sizes.n_layers} layers is none of the named sizes ({', '.join(SIZES)}), and the "
            "number of attention heads cannot be read from shapes; give --heads"
        )
    grid_fact = facts.grid(*said) if grid is None else facts.Fact(grid, "--grid")
    if grid_fact is None:
        raise CheckpointError(
            f"{path}: the token grid cannot be read from shapes; give --grid (24 for 384 px, 16 for 256 px)"
        )
    if math.prod(grid_fact.value) > MOST_TOKENS:
        raise CheckpointError(
            f"{path}: a grid of {facts.grid_text(grid_fact.value)} ({grid_fact.source}) has more than {MOST_TOKENS} tokens; "
            "give another --grid"
        )
    ablations = {name: saved[name] for name in ABLATIONS if name in saved}
    for name, value in ablations.items():
        if value not in ABLATIONS[name] or type(value) is not type(ABLATIONS[name][0]):
            raise CheckpointError(f"{path}: its config says {name}={value!r}; expected one of {ABLATIONS[name]}")
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
        with torch.device("meta"):
            expected = PAR(config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_keys(path, checkpoint.tensors, expected)
    return Inferred(config, heads_fact.source, grid_fact.source)


def _sizes(checkpoint: Checkpoint) -> facts.Sizes:
    """What the shapes show. Raises CheckpointError for another file than a PAR model's."""
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
    layers = {int(m.group(1)) for key in have if (m := re.match(r"layers\.([0-9]{1,4})\.", key))}
    n_layers = max(layers) + 1 if layers else 0
    if n_layers != len(layers) or not layers:  # before a model of so many layers is made
        raise CheckpointError(
            f"{path}: holds layers {_some([str(i) for i in sorted(layers)]) or 'none'}; expected layers.0 and on without a gap"
        )
    n = _shape(path, have, special, 2)[0] + 1 if special in have else 1
    return facts.Sizes(dim, n_layers, vocab, rows - 1, n)


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
    groups = checkpoint.config.get("norm_groups", 32)
    if facts.whole(groups) is None:
        raise CheckpointError(f"{path}: its config says norm_groups={groups!r}; expected a whole number")
    try:
        config = VQConfig(
            codebook_size=size,
            codebook_dim=dim,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            res_blocks=blocks,
            z_channels=_shape(path, have, "post_quant_conv.weight", 4)[0],
            norm_groups=groups,
        )
        with torch.device("meta"):
            expected = VQModel(config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
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
    """Raise CheckpointError unless ``have`` holds exactly the keys and shapes of ``expected``, as numbers that are weights."""
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
        if have[key].dtype not in FLOATS and key != UNUSED:
            raise CheckpointError(
                f"{path}: {key} is stored as {str(have[key].dtype).removeprefix('torch.')}; expected float32, bfloat16 or "
                "float16: quantized weights need scales that no key of the architecture holds"
            )


def _some(keys: list[str]) -> str:
    return ", ".join(key[:80] for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
