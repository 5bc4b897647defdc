"""Which file a checkpoint is, and in which format: ``torch.save``, safetensors, sharded safetensors.

Nothing here looks at what the tensors are; nothing in a pickle is ever run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

INDEX = ".safetensors.index.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says what was given, what is expected and how to fix it."""


def read(path: Path) -> Mapping[str, Any]:
    """The content of the checkpoint at ``path``, its tensors mapped from the file.

    A ``.pt`` file (or any other of ``torch.save``), a ``.safetensors`` file, an index of sharded safetensors
    (``model.safetensors.index.json``), or the folder that holds one of these. Raises CheckpointError.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a checkpoint: .pt, .safetensors or {INDEX.lstrip('.')}")
    if path.name.endswith(INDEX):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path)


def _in_folder(folder: Path) -> Path:
    """The checkpoint in a folder: its index of shards, else its only checkpoint file."""
    found = sorted(folder.glob(f"*{INDEX}")) or sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")])
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:4]) or "no .pt, .safetensors or index of shards"
        raise CheckpointError(f"{folder}: expected a folder with one checkpoint, found {names}; give the file itself")
    return found[0]


def _read_sharded(index: Path) -> Mapping[str, Any]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({type(error).__name__}: {error}); expected JSON with a 'weight_map'"
        ) from error
    outside = [name for name in shards if Path(name).name != name]
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if outside or missing:
        what = (
            f"names files elsewhere ({outside[0]})" if outside else f"{len(missing)} shards are missing ({missing[0]})"
        )
        raise CheckpointError(f"{index}: {what}; put all {len(shards)} shards beside the index")
    tensors: dict[str, Any] = {}
    for name in shards:
        tensors |= _read_safetensors(index.parent / name)
    if tensors.keys() != places.keys():
        odd = sorted(tensors.keys() ^ places.keys())
        raise CheckpointError(
            f"{index}: shards and index do not agree about {', '.join(odd[:3])}; download all files again"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path}: reading it needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(str(path), framework="pt") as file:  # maps the file; a tensor is a view of the mapping
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}); the file may be truncated: compare its size "
            f"({path.stat().st_size} bytes) with the original's and copy it again"
        ) from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """The content of a file of ``torch.save``, its tensors mapped; only tensors and plain values are ever made."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:
        # torch wraps the reason in advice to load unsafely, which must not reach anybody; the reason is the context.
        inner = error.__context__ if isinstance(error.__context__, Exception) else error
        reason = next(iter(str(inner).strip().splitlines()), "") or type(inner).__name__
        unsafe = re.search(r"unsupported (?:global|operand|class).*", f"{inner}\n{error}", re.IGNORECASE)
        if unsafe:
            raise CheckpointError(
                f"{path}: holds something other than tensors and plain values ({unsafe.group(0)[:200]}); "
                "it was not run; save the state dict alone with torch.save(model.state_dict(), path)"
            ) from error
        raise CheckpointError(
            f"{path}: not a readable PyTorch checkpoint ({reason}); the file may be truncated: compare its size "
            f"({path.stat().st_size} bytes) with the original's and copy it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    return content
