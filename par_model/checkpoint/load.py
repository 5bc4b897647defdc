"""A checkpoint file to its tensors, by the key names of the model. Nothing in a file is ever run.

The weights are the whole file (a bare dict) or lie under ``model``, ``module`` or ``state_dict``, in that order, and
never under ``ema``; the published code reads its files in the same way. Parts of keys that wrappers added (DDP, FSDP,
torch.compile) are removed. Files are mapped into memory: a tensor takes memory when it is read. ``file.py`` finds the
file and its format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_model.checkpoint.errors import CheckpointError
from par_model.checkpoint.file import read
from par_model.checkpoint.pickle import Arguments, plain

#: Buffers that old files hold and this package computes. Any other extra key is refused.
DROPPED = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")
NESTED_UNDER = ("model", "module", "state_dict")
#: Parts of keys that wrappers of a model add: DDP in front; torch.compile, FSDP and activation checkpointing anywhere.
WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file by key, and the other contents of the file that are used."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  #: only in files of ``parvis train`` and ``train-tokenizer``
    class_names: list[str] | None = None  #: only in files of ``parvis train``
    args: dict[str, Any] = field(default_factory=dict)  #: the arguments of a training by the published code
    left: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  #: key -> shape of the tensors that :data:`DROPPED` drops

    def tensor(self, key: str) -> Tensor:
        """The tensor of ``key``, mapped from the file, in the file's dtype."""
        return self.tensors[key]

    def release(self) -> None:
        """Unmap the file, which frees its memory; it is mapped again at the next access. Tensors in use stay valid."""
        if isinstance(self.tensors, _MappedTensors):
            self.tensors.release()


class _MappedTensors(Mapping[str, Tensor]):
    """Tensors by key, mapped from their file at the first access; ``release`` unmaps the file."""

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
        """Unmap the file until the next access."""
        self._mapped = None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Map the checkpoint at ``path``. Raises CheckpointError if it is none, OSError if it cannot be read."""
    path = Path(path)
    content = read(path)
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
        return {keys[k]: v for k, v in _weights(path, read(path)).items() if not DROPPED.fullmatch(keys[k])}

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
    """Key of the file -> key of the model. Raises CheckpointError where two keys become the same one."""
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
    """The tensors by key: those under the first of :data:`NESTED_UNDER`, else the whole file. Raises CheckpointError.

    Each is a view, without the attributes that a pickle may have set on its tensor.
    """
    weights = next((plain(content[k]) for k in NESTED_UNDER if isinstance(content.get(k), dict)), plain(content))
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if wrong or not weights:
        named = ", ".join(key if isinstance(key, str) else f"a key of type {type(key).__name__}" for key in wrong[:5])
        raise CheckpointError(
            f"{path}: expected tensors by name, at the top or under {', '.join(NESTED_UNDER)}; found "
            f"{named or 'nothing'}"
        )
    return {key: Tensor.detach(value) for key, value in weights.items()}


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless ``tensor`` is dense and all its numbers are in the file."""
    kind = None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "sparse, quantized or nested"
    elif tensor.device.type != "cpu":
        kind = f"a tensor on the device {tensor.device.type!r}, without numbers"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"of shape {tuple(tensor.shape)} but holds fewer numbers"
    if kind is not None:
        raise CheckpointError(f"{path}: {key} is {kind}; expected plain tensors: save model.state_dict() of the model")
