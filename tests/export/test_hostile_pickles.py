"""Checkpoints made to do harm when they are unpickled: nothing is run; both verbs end in one line, exit code 2."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hostile_files
import pytest
import torch
from hostile_files import CONFIG, VICTIM, State, saved

from par_runtime.cli import dispatch as cli

refused, state = hostile_files.refused, hostile_files.state  # fixtures


class Reduced:
    """Pickled as a call of ``function`` with ``arguments``, and a state."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stateful:
    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: object) -> None:
        os.mkdir(VICTIM)


class Subclass(argparse.Namespace):
    pass


class Mode(enum.Enum):
    FAST = 1


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Reduced(os.mkdir, (VICTIM,)), "mkdir"),
        (Reduced(os.system, (f"mkdir {VICTIM}",)), "system"),
        (Reduced(eval, (f"__import__('os').mkdir({VICTIM!r})",)), "(eval)"),
        (Reduced(getattr, (Path, "mkdir")), "(getattr)"),
        (Reduced(torch.load, (VICTIM,)), "torch.serialization.load"),
        (Stateful(), "Stateful"),
        (Subclass(a=1), "Subclass"),
        (argparse.Namespace(inner=Subclass(a=1)), "Subclass"),
        # Before Python 3.11.4 an Enum is pickled as getattr of its class.
        (Mode.FAST, "(getattr)" if cast(Any, Mode.FAST).__reduce_ex__(2)[0] is getattr else "Mode"),
        ([{"deep": (Stateful(),)}], "Stateful"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_refused_by_name(
    tmp_path: Path, state: State, refused: Callable[..., None], thing: Any, name: str, zipped: bool
) -> None:
    content = {"model": state, "config": CONFIG, "args": argparse.Namespace(thing=thing)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refused(path, "holds something other than tensors and plain values")
    refused(path, name)
    refused(path, "it was not run")


class StorageId:
    """Pickled as torch's persistent id of a storage, or of something else."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return thing.parts if isinstance(thing, StorageId) else None


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(folder: Path, data: bytes, top: str = "a", method: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive like torch.save's, with ``data`` as its pickle and one storage of 16 bytes."""
    with zipfile.ZipFile(folder / "c.pt", "w", method) as file:
        file.writestr(f"{top}/data.pkl", data)
        file.writestr(f"{top}/data/0", b"\0" * 16)
        file.writestr(f"{top}/version", "3\n")
    return folder / "c.pt"


def test_tensors_in_parts(tmp_path: Path, refused: Callable[..., None]) -> None:
    """Of FSDP's sharded state dicts; whether torch.distributed is imported or not."""
    for name in ("torch.distributed._shard.sharded_tensor.api ShardedTensor", "torch.distributed.tensor DTensor"):
        module, kind = name.split()
        path = archive(tmp_path, f"\x80\x02c{module}\n{kind}\n)\x81.".encode("latin-1"))
        refused(path, "in parts for several processes" if "Sharded" in name else "c.pt: ")


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0", count: int = 4) -> Reduced:
    storage = StorageId("storage", torch.FloatStorage, key, "cpu", count)
    return Reduced(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict()))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor((1000, 1000), (1000, 1)), "not a readable"),
        (tensor((2, 2), (2, 1), offset=10**6), "not a readable"),
        (tensor((2, 2), (2, 1), offset=-100), "not a readable"),
        (tensor((2**10, 2**10), (2**10, 1), count=2**30), "not a readable"),
        (tensor((2, 2), (2, 1), count=-4), "not a readable"),
        (tensor((2**40, 2**20), (0, 0)), "tok_embeddings.weight is of shape (1099511627776, 1048576) but holds fewer"),
        (tensor((2, 2), (2, 1), key="../../../etc/passwd"), "not a readable"),
        (Reduced(VICTIM.join, ("ab",)), "(getattr)"),
    ],
)
def test_tensors_that_reach_outside_of_the_file(
    tmp_path: Path, refused: Callable[..., None], made: Reduced, message: str
) -> None:
    refused(archive(tmp_path, pickled({"model": {"tok_embeddings.weight": made}})), message)


def test_archives_that_torch_did_not_write(tmp_path: Path, refused: Callable[..., None]) -> None:
    evil = pickled(Reduced(os.mkdir, (VICTIM,)))
    refused(archive(tmp_path, evil), "mkdir); it was not run")
    refused(archive(tmp_path, evil, "../../outside"), "c.pt: ")
    refused(archive(tmp_path, b"\0" * 10**8, method=zipfile.ZIP_DEFLATED), "'a/data.pkl' is compressed")
    path = archive(tmp_path, b"\0" * 1000)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"a/data/0"))  # of the storage, in the table of contents
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    refused(path, "its entries are larger than the file")
    with tarfile.open(tmp_path / "c.pt", "w") as file:
        for name in ("../../../outside", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(evil)
            file.addfile(entry, io.BytesIO(evil))
    refused(tmp_path / "c.pt", "is a tar archive: unpack it and give the checkpoint in it")
    (tmp_path / "c.pt").write_bytes(pickled({"model": StorageId("evil", "x")}))
    refused(tmp_path / "c.pt", "not a readable PyTorch checkpoint")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Reduced(os.mkdir, (VICTIM,))))
    refused(tmp_path / "c.pt", "pickled with protocol 4 or 5")


def test_a_namespace_takes_no_attribute_of_the_file(tmp_path: Path, state: State, capsys: Any) -> None:
    """argparse's own class would take its class, its dict, or a ``__setstate__`` for the next state from the file."""
    for chosen in (
        {"__class__": 1, "__dict__": 2, "values": 3, "image_size": 64},
        (None, {"__class__": collections.OrderedDict, "__setstate__": torch._utils._rebuild_tensor_v2}),
        [1, 2],
    ):
        content = {"model": state, "config": CONFIG, "args": Reduced(argparse.Namespace, (), chosen)}
        assert (
            cli.main(["inspect", str(saved(tmp_path, content))]) == 0 or "contradicts itself" in capsys.readouterr().err
        )


class Replaced:
    """Pickled as an ``OrderedDict`` whose methods a file has replaced."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = items

    def __reduce__(self) -> tuple[Any, ...]:
        methods = dict.fromkeys(("items", "keys", "get", "values", "__iter__"), torch.Size)
        return collections.OrderedDict, (), methods, None, iter(self.items.items())


def test_methods_that_a_file_replaces_are_never_called(tmp_path: Path, state: State) -> None:
    norm = state["norm.weight"].clone()
    vars(norm).update(dict.fromkeys(("to", "detach", "float", "numel"), torch.Size))
    content = Replaced({"model": Replaced(state | {"norm.weight": norm}), "config": Replaced(CONFIG)})
    path = saved(tmp_path, content)
    assert cli.main(["inspect", str(path)]) == 0
    assert cli.main(["export", "--checkpoint", str(path), "--tokenizer", "none", "--out", str(tmp_path / "b")]) == 0
