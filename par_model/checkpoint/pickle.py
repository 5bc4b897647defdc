"""Files of ``torch.save``, read without running anything in them.

torch's ``weights_only`` reader makes tensors and plain values, and refuses every other object. Training files hold a
few more kinds beside their weights (``argparse.Namespace``, paths, numpy's numbers). Each of these names is mapped to
a stand-in of ours, so that even these classes are never called: numpy's own ``dtype`` takes flags from the file, and
with some of them bytes are read as pointers. A name that is not in the table below is refused, and the error names it.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from par_model.checkpoint.errors import CheckpointError, utf8_name
from par_model.system import OF_THE_SYSTEM, naming


class Inert:
    """Stands for a value that is not used: takes any arguments and keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class Arguments:
    """Stands for ``argparse.Namespace``: its ``values`` by name; a file cannot set attributes of it."""

    values: Mapping[str, Any] = MappingProxyType({})  # of the class, because unpickling calls no ``__init__``

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.values = {k: v for k, v in plain(state).items() if isinstance(k, str)}


class DType:
    """Stands for ``numpy.dtype``: its code ("f8") and byte order, with which :func:`scalar` reads simple numbers."""

    order = "<"
    code: object = None

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


#: numpy's code of a number -> the code in ``struct``.
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {
    f"{kind}{size}": letter if kind == "i" else letter.upper()
    for kind in "iu"
    for size, letter in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))
}


def scalar(dtype: object = None, data: object = None, *_: object) -> object:
    """Stands for a number of numpy: the same number of Python; None for anything other than a simple number."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes) or not isinstance(dtype.code, str):
        return None
    code = dtype.order + NUMBERS.get(dtype.code, "")
    return struct.unpack(code, data)[0] if len(code) > 1 and struct.calcsize(code) == len(data) else None


def path(*parts: object) -> str:
    """Stands for a path: its parts as text."""
    return "/".join(part for part in parts if isinstance(part, str))


def empty_dict(*_: object) -> dict[object, object]:
    """Stands for a ``defaultdict``: an empty dict, which the reader then fills."""
    return {}


def plain(mapping: object) -> dict[Any, Any]:
    """A dict with the items of ``mapping``, a dict of any kind; an empty dict for every other object.

    A pickle may set any attributes on an ``OrderedDict``, even those named like methods; none is looked up here.
    """
    return dict(dict.items(mapping)) if isinstance(mapping, dict) else {}


def _stand_ins() -> dict[str, Callable[..., object]]:
    """Name in the file -> what is made in its place."""
    names: dict[str, Callable[..., object]] = {
        "argparse.Namespace": Arguments,
        "types.SimpleNamespace": Arguments,
        "collections.defaultdict": empty_dict,
        "numpy.dtype": DType,
        "numpy.ndarray": Inert,
    }
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1, numpy 2
        names |= {f"{core}.scalar": scalar, f"{core}._reconstruct": Inert}
    for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
        names |= {f"pathlib.{kind}": path, f"pathlib._local.{kind}": path}  # the second: Python 3.13
    for kind in ("bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"):
        names[f"builtins.{kind}"] = Inert
    return names | {f"datetime.{kind}": Inert for kind in ("date", "datetime", "timedelta")}


def read_pickle(file: Path) -> dict[Any, Any]:
    """The content of a file of ``torch.save``, its tensors mapped from it.

    Raises CheckpointError, MemoryError, OSError.
    """
    _check_container(file)
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _stand_ins().items()]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about pickle protocols and old storages; where it matters an error follows
            name = utf8_name(file)
            try:
                if name is not None:
                    with naming(file):
                        content = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                name = None
            if name is None:  # the format before torch 1.6, or a name that torch cannot map
                with naming(file), file.open("rb") as opened:
                    content = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            raise
        # torch puts advice to load unsafely around the reason, which no user must see. The reason is the context.
        inner = error.__context__ if isinstance(error.__context__, Exception) else error
        if "allocate memory" in f"{inner}{error}":
            raise MemoryError(str(inner)) from error
        raise CheckpointError(_reason(file, f"{inner}\n{error}")) from error
    if not isinstance(content, dict):
        kind = "Namespace" if isinstance(content, Arguments) else type(content).__name__
        raise CheckpointError(f"{file}: holds a {kind}; expected a dict of tensors")
    return plain(content)


def _check_container(file: Path) -> None:
    """Raise CheckpointError for an empty file, and for a zip archive that ``torch.save`` cannot have written."""
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(f"{file}: is empty; copy or download it again")
    with naming(file), file.open("rb") as f:
        if f.read(2) != b"PK":
            return  # the format before torch 1.6, or no checkpoint at all
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a readable PyTorch checkpoint (no table of contents); {_copy(file)}"
        ) from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size:
        what = f"{packed[0]!r} is compressed" if packed else "its entries are larger than the file"
        raise CheckpointError(
            f"{file}: is a zip archive that torch.save did not write ({what}); give the file that torch.save wrote"
        )


def in_parts(kind: str) -> str:
    """What a file is whose tensors are of the class ``kind`` of torch.distributed, and what to do."""
    return (
        f"holds tensors in parts for several processes ({kind}); save the whole state dict in one file, with "
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
    )


def _reason(file: Path, text: str) -> str:
    """The message of an error: torch's ``text`` in one line, with what to do."""
    name = re.search(r"unsupported global:? (?:GLOBAL )?([\w.<>-]+)", text, re.IGNORECASE)
    if "DTensor" in text or (name and name.group(1).startswith("torch.distributed")):
        return f"{file}: {in_parts(name.group(1) if name else 'DTensor')}"
    if name:
        return (
            f"{file}: holds something other than tensors and plain values ({name.group(1)}); it was not run; save the "
            "state dict alone with torch.save(model.state_dict(), path)"
        )
    protocol = re.search(r"unsupported operand (\d+)", text, re.IGNORECASE)
    if protocol and int(protocol.group(1)) in (0x8C, 0x8E, 0x8F, 0x91, 0x92, 0x93, 0x94, 0x95, 0x96):
        return (
            f"{file}: was pickled with protocol 4 or 5, which is not read without running it; save it with torch.save "
            "and no pickle_protocol"
        )
    if protocol:
        return f"{file}: not a readable PyTorch checkpoint (no pickle of torch.save); {_copy(file)}"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "") or "no reason given"
    if "mmap" in first:
        first = "neither of the formats of torch.save"
    first = re.sub(r"\. This is an internal miniz error.*|\s*\(Could this error message.*", "", first)[:200]
    return f"{file}: not a readable PyTorch checkpoint ({first}); {_copy(file)}"


def _copy(file: Path) -> str:
    """The advice for a file that is not whole."""
    size = file.stat().st_size
    return f"the file may be truncated: compare its size ({size} bytes) with the original's and copy it again"
