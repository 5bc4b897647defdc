"""Which file a path means, and in which format it is: ``torch.save``, safetensors, shards with an index.

This module does not look at the tensors. Nothing in a pickle is ever run.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from par_model.checkpoint.errors import CheckpointError, shown, some, utf8_name
from par_model.checkpoint.pickle import read_pickle
from par_model.checkpoint.recognise import file_problem, folder_problem, not_a_file
from par_model.objects import unique
from par_model.system import OF_THE_SYSTEM, naming

INDEX = ".safetensors.index.json"
PICKLED_INDEX = ".bin.index.json"  #: of shards that ``torch.save`` wrote
INDEXES = (INDEX, PICKLED_INDEX)
#: The file of the weights in a folder of FSDP training; the other files hold the optimizer's state, one per rank.
CONSOLIDATED = "consolidated.pth"
#: The same of DeepSpeed, unless ZeRO-3 has split the weights.
DEEPSPEED = "mp_rank_00_model_states.pt"
#: Names of whole models, in the order in which they are taken where a folder of the hub holds the same model twice.
WHOLE = ("model.safetensors", "pytorch_model.bin")
ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
#: What trainers save beside the weights, in files with the same endings.
BESIDE = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args", "trainer_state")
#: End of the name of one shard of several.
SHARD = re.compile(r"-\d{1,5}-of-(\d{1,5})\.\w+$")
#: What ``parvis train`` saves in the folder of a run: the second is the result, the first only to resume from.
RUN = ["checkpoint.pt", "model.pt"]
MOST_JSON_BYTES = 64 * 2**20
MOST_HEADER_BYTES = 100 * 2**20  # of safetensors; its own reader allows no more either


def read(path: Path) -> dict[Any, Any]:
    """The content of the checkpoint at ``path``, its tensors mapped from the file. Keys and values are not checked.

    A file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), a ``.safetensors`` file, the index of such
    files (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``), or the folder that holds one of these.
    Raises CheckpointError, OSError.
    """
    try:
        path = find(path)
        if path.name.endswith(INDEXES):
            return _read_sharded(path)
        if (shard := SHARD.search(path.name)) is not None and int(shard.group(1)) > 1:
            raise CheckpointError(
                f"{path}: is one of {int(shard.group(1))} shards; give the folder that holds all of them and their "
                f"index (...{INDEX} or ...{PICKLED_INDEX})"
            )
        return _read_one(path)
    except PermissionError as error:
        raise CheckpointError(
            f"{error.filename or path}: no permission to read it; change its permissions, or copy it"
        ) from error


def find(path: Path) -> Path:
    """The file that ``path`` means: itself, or the checkpoint in this folder. Raises CheckpointError, OSError."""
    if (why := not_a_file(path)) is not None:
        raise CheckpointError(f"{path}: {why}")
    return _in_folder(path) if path.is_dir() else path


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in the file at ``path``. Raises CheckpointError, which says what was ``expected``, OSError."""
    if (why := not_a_file(path)) is not None or not path.is_file():
        raise CheckpointError(f"{path}: {why or 'is a folder'}")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too many for JSON; expected {expected}")
    try:
        with naming(path):
            text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({str(error)[:200]}); expected {expected}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected {expected}")
    return content


def _in_folder(folder: Path) -> Path:
    """The checkpoint in a folder: an index of shards, else the only file of weights.

    Raises CheckpointError where there is none, or more than one.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    ours = [name for name in names if name.endswith(ENDINGS) and not name.startswith((*BESIDE, "."))]
    for choice in (
        [name for name in names if name.endswith(INDEX)],
        [name for name in names if name.endswith(PICKLED_INDEX)],
        [name for name in names if name in (CONSOLIDATED, DEEPSPEED)],
        [name for name in WHOLE if name in ours][: 1 if set(ours) <= set(WHOLE) else None],
        RUN[1:] if ours == RUN else [],
        ours,
    ):
        if len(choice) == 1:
            return folder / choice[0]
    if (why := folder_problem(folder)) is not None:
        raise CheckpointError(f"{folder}: {why}")
    if ours and all(SHARD.search(name) for name in ours):
        raise CheckpointError(
            f"{folder}: holds shards ({some(ours)}) without their index; copy the file ...{INDEX} or "
            f"...{PICKLED_INDEX} there too"
        )
    if ours:
        raise CheckpointError(
            f"{folder}: expected a folder with one checkpoint, found {some(ours, 4)}; give the file itself"
        )
    inside = _folders_with_one(folder)
    if inside:
        raise CheckpointError(f"{folder}: holds no checkpoint itself, but {some(inside, 4)} does; give that folder")
    raise CheckpointError(
        f"{folder}: expected a folder with one checkpoint, found no .pt, .safetensors or index of shards (and no .pth, "
        ".bin or .ckpt); give the file itself"
    )


def _folders_with_one(folder: Path) -> list[Path]:
    """The folders in ``folder``, or in one of these, that hold files of weights or parts of a checkpoint."""
    found = []
    for pattern in ("*/*", "*/*/*"):
        for file in folder.glob(pattern):
            if file.name.endswith((*ENDINGS, *INDEXES, ".distcp")) and file.parent not in found:
                found.append(file.parent)
        if found:
            break
    return sorted(found)


def _read_sharded(index: Path) -> dict[str, Any]:
    expected = "JSON with a 'weight_map' of file names"
    try:
        places = read_json(index, expected)["weight_map"]
        shards = sorted(set(places.values()))
        outside = [name for name in shards if Path(name).name != name or name == ".." or "\0" in name]
    except CheckpointError as error:
        raise CheckpointError(f"{index}: not an index of shards ({str(error).removeprefix(f'{index}: ')})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards ({type(error).__name__}: {str(error)[:200]}); expected {expected}"
        ) from error
    missing = [name for name in shards if not (index.parent / name).is_file()] if not outside else []
    if outside or missing:
        what = (
            f"names files outside its folder ({shown(outside[0])})"
            if outside
            else f"{len(missing)} shards are missing ({some(missing)})"
        )
        raise CheckpointError(f"{index}: {what}; put all {len(shards)} shards beside the index")
    tensors: dict[Any, Any] = {}
    for name in shards:
        part = _read_one(index.parent / name)
        if twice := sorted(str(key) for key in part.keys() & tensors.keys()):
            raise CheckpointError(f"{index}: two shards hold {some(twice)}; download all files again")
        tensors |= part
    if tensors.keys() != places.keys():
        differing = sorted(str(key) for key in tensors.keys() ^ places.keys())
        raise CheckpointError(
            f"{index}: shards and index do not agree about {some(differing)}; download all files again"
        )
    return tensors


def _read_one(path: Path) -> dict[Any, Any]:
    """The content of one file, in the format that its bytes have, whatever it is called."""
    if (why := file_problem(path)) is not None:
        raise CheckpointError(f"{path}: {why}")
    with naming(path), path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" and head.startswith((b"PK", b"\x80")):  # torch refuses it by its name
        raise CheckpointError(f"{path}: is a file of torch.save, not of safetensors: rename it to {path.stem}.pt")
    if path.suffix == ".safetensors" or _is_safetensors(head, path.stat().st_size):
        return _read_safetensors(path)
    return read_pickle(path)


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file that begins with ``head`` (9 bytes) has the header of safetensors: its length, then JSON."""
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < min(size, MOST_HEADER_BYTES)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path}: reading it needs the package safetensors: pip install safetensors") from error
    try:
        name = utf8_name(path)
        with naming(path):
            if name is None:  # safetensors opens no such file, and takes its content instead
                return dict(load(path.read_bytes()))
            with safe_open(name, framework="pt") as file:  # maps the file; a tensor is a view of the mapping
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            raise
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({str(error)[:200]}); the file may be truncated: compare its "
            f"size ({path.stat().st_size} bytes) with the original's and copy it again"
        ) from error
