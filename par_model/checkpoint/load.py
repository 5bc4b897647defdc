"""A checkpoint file to its tensors, by the key names of the model. Nothing in a file is ever run.

Files are mapped into memory: a tensor takes memory when it is read. ``file.py`` finds the file and its format,
``weights.py`` the weights in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_model.checkpoint.beside import by_published_names
from par_model.checkpoint.errors import CheckpointError
from par_model.checkpoint.file import read
from par_model.checkpoint.pickle import Arguments, plain
from par_model.checkpoint.weights import Kind, choose, named

#: Buffers that old files hold and this package computes. Any other extra key is refused.
DROPPED = re.compile(r"freqs_cis|layers\.\d+\.attention\.kv_cache\..*")
#: Names under which trainers save the numbers of the model, where they do not save ``args``.
OTHER_ARGUMENTS = ("model_args", "model_config", "config", "hyper_parameters", "hparams", "cfg")


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
    args_under: str = "args"  #: the name under which the file holds the arguments
    name: str | None = None  #: of the bundle that the weights were read from; only in such files
    defaults: dict[str, Any] = field(default_factory=dict)  #: sampling settings of that bundle, not checked
    kinds: tuple[Kind, ...] = ("model",)  #: which weights the file holds; the first are these
    notes: tuple[str, ...] = ()  #: which weights of the file these are, in words, where it is not obvious

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


def open_checkpoint(path: str | Path, weights: Kind | None = None) -> Checkpoint:
    """Map the checkpoint at ``path``. Raises CheckpointError if it is none, OSError if it cannot be read.

    ``weights``: the trained ones ("model") or their average ("ema"), where the file holds both; None: those that the
    published code takes (see ``weights.py``).
    """
    path = Path(path)
    content = read(path)
    chosen, others, notes = choose(path, content, weights)
    beside = content if named(content) else {}  # else the weights are the whole file
    config, names = plain(beside.get("config")), beside.get("class_names")
    args_under, args = _arguments(beside)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path}: its class_names are not a list of names; give it without them")
    if (parts := content.get("mp_world_size")) not in (None, 1) and isinstance(parts, int):
        raise CheckpointError(
            f"{path}: is one of {parts} parts of a model that DeepSpeed split (mp_world_size {parts}); save the whole "
            "state dict in one file"
        )
    for key, value in chosen.tensors.items():
        _check_tensor(path, key, value)
    left = {key: tuple(value.shape) for key, value in chosen.tensors.items() if DROPPED.fullmatch(key)}
    kind = chosen.kind

    def tensors() -> dict[str, Tensor]:
        taken, *_ = choose(path, read(path), kind)
        return {key: value for key, value in taken.tensors.items() if not DROPPED.fullmatch(key)}

    bundle = plain(beside.get("bundle"))
    name, defaults = bundle.get("name"), plain(bundle.get("defaults"))
    del content, chosen, beside
    return Checkpoint(
        path,
        _MappedTensors(tensors),
        config,
        names,
        args,
        left,
        args_under=args_under,
        name=name if isinstance(name, str) else None,
        defaults=defaults,
        kinds=(kind, *others),
        notes=tuple(notes),
    )


def _arguments(content: Mapping[Any, Any]) -> tuple[str, dict[str, Any]]:
    """The arguments of a training, and the name under which a file holds them.

    The published trainers save ``args``; others save the numbers of the model under a name of their own, and with
    other names for some of them. The ``config`` of ``parvis train`` has a ``kind`` and is read as it is.
    """
    args = content.get("args")
    if values := dict(args.values) if isinstance(args, Arguments) else plain(args):
        return "args", values
    for name in OTHER_ARGUMENTS:
        found = content.get(name)
        values = dict(found.values) if isinstance(found, Arguments) else plain(found)
        if "kind" not in values and (values := by_published_names(values)):
            return name, values
    return "args", {}


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
