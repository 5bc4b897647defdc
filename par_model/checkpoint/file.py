"""Which file a path means, and in which format it is: ``torch.save``, safetensors, sharded safetensors.

This module does not look at the tensors. Nothing in a pickle is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from par_model.checkpoint.errors import CheckpointError
from par_model.checkpoint.pickle import read_pickle

INDEX = ".safetensors.index.json"
#: The file of the weights in a folder of FSDP training; the other files hold the optimizer's state, one per rank.
CONSOLIDATED = "consolidated.pth"


def read(path: Path) -> dict[Any, Any]:
    """The content of the checkpoint at ``path``, its tensors mapped from the file. Keys and values are not checked.

    A ``.pt`` file (or any other of ``torch.save``), a ``.safetensors`` file, an index of sharded safetensors
    (``model.safetensors.index.json``), or the folder that holds one of these. Raises CheckpointError, OSError.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a checkpoint: .pt, .safetensors or {INDEX.lstrip('.')}")
    if path.name.endswith(INDEX):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_pickle(path)


def _in_folder(folder: Path) -> Path:
    """The checkpoint in a folder: an index of shards, else FSDP's consolidated weights, else the only checkpoint file.

    Raises CheckpointError where there is none, or more than one.
    """
    files = sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob(CONSOLIDATED))
    files = files or sorted(file for kind in ("safetensors", "pt", "pth") for file in folder.glob(f"*.{kind}"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:4]) or "no .pt, .safetensors or index of shards"
        raise CheckpointError(f"{folder}: expected a folder with one checkpoint, found {names}; give the file itself")
    return files[0]


def _read_sharded(index: Path) -> dict[str, Any]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
        outside = [name for name in shards if Path(name).name != name or name == ".." or "\0" in name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({type(error).__name__}: {error}); expected JSON with a 'weight_map' of "
            "file names"
        ) from error
    missing = [name for name in shards if not (index.parent / name).is_file()] if not outside else []
    if outside or missing:
        what = (
            f"names files outside its folder ({outside[0]!r})"
            if outside
            else f"{len(missing)} shards are missing ({missing[0]})"
        )
        raise CheckpointError(f"{index}: {what}; put all {len(shards)} shards beside the index")
    tensors: dict[str, Any] = {}
    for name in shards:
        tensors |= _read_safetensors(index.parent / name)
    if tensors.keys() != places.keys():
        differing = sorted(tensors.keys() ^ places.keys())
        raise CheckpointError(
            f"{index}: shards and index do not agree about {', '.join(differing[:3])}; download all files again"
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
