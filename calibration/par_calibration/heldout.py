"""Real images that no training has seen, as tokens: what likelihoods are measured on.

A bundle can hold some itself (``heldout.npz``, in its manifest like every file). Others are given as a folder of
pictures, or as a file of ``parvis encode``. Without any, tokens that the model drew stand in, and say so.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_calibration.errors import CalibrationError
from par_calibration.pictures import HOW, Pictures, Pixels, find_pictures, turns
from par_runtime.bundle import HELDOUT, MANIFEST, Bundle, seal
from par_runtime.checked import read_regular, shown, shown_path
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.known import sequence_tokens
from par_runtime.reading import advised
from par_runtime.request import class_index
from par_runtime.system import naming, sha256, write_beside
from par_runtime.tokenizer import Tokenizer

MOST_FILE_BYTES = 2**28  #: of any file of tokens: half a million images of 256 tokens
MOST_ARRAY_BYTES = 2**29  #: of one of its arrays, unpacked
MOST_HEADER_BYTES = 10_000
MOST_IMAGES = 2**20


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images as tokens [M,N] int64 in sequence order, with their classes; the classes take turns.

    ``real`` is False for tokens that the original model drew itself: they stand in where there are no real images.
    """

    tokens: Int
    labels: tuple[int, ...]
    source: str  #: where they come from, in words
    real: bool

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> HeldOut:
        """The first ``count`` images; since classes take turns, these are of as many classes as possible."""
        return HeldOut(self.tokens[:count], self.labels[:count], self.source, self.real)

    def of_classes(self, only: Collection[int], bundle: Bundle | None = None) -> HeldOut:
        """Those of the classes ``only``; all where none is named. Raises CalibrationError where there are none, which
        names the ``bundle`` that holds them.
        """
        if not only:
            return self
        chosen = [i for i, label in enumerate(self.labels) if label in only]
        if not chosen:
            where = self.source if bundle is None else shown_path(bundle.path / HELDOUT)
            raise CalibrationError(f"{where}: holds no images of these classes; give others with --label")
        return HeldOut(self.tokens[chosen], tuple(self.labels[i] for i in chosen), self.source, self.real)


def find(bundle: Bundle, real: Path | None, most: int, only: Collection[int] = ()) -> HeldOut | None:
    """At most ``most`` held-out images: those of ``real`` (a folder or a file), else those that the bundle holds;
    ``only`` of these classes, where any is named.

    None where there are none. Raises CalibrationError, RequestError, OSError.
    """
    if real is not None and real.is_dir():
        return from_pictures(bundle, find_pictures(bundle, real, most, only))
    if real is not None:
        return read(bundle, real, shown_path(real)).of_classes(only).first(most)
    if HELDOUT in bundle.files:
        return read(bundle, bundle.path / HELDOUT, f"{HELDOUT} of the bundle").of_classes(only, bundle).first(most)
    return None


def write(path: Path, tokens: Int, labels: Sequence[int]) -> None:
    """Write ``tokens`` [M,N] in sequence order and their classes to a file for :func:`read`. Raises OSError.

    The same numbers give the same bytes: no time is stored.
    """

    def save(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, tokens=tokens.astype(np.uint16), labels=np.asarray(labels, np.uint16))

    write_beside(path, save)


def attach(bundle: Bundle, tokens: Int, labels: Sequence[int]) -> Path:
    """Put held-out images into the folder of ``bundle``: the file, and its size and hash in the manifest, which gets a
    hash of its own anew. Nothing else of the bundle changes. Returns the file's path. Raises OSError.
    """
    file, manifest = bundle.path / HELDOUT, bundle.path / MANIFEST
    with naming(manifest):
        entries = json.loads(manifest.read_text(encoding="utf-8"))

    def replace_both(part: Path) -> None:
        # Both are written before one is renamed, since a bundle with one of them alone cannot be opened.
        write(part, tokens, labels)
        files = entries["files"] | {HELDOUT: {"bytes": part.stat().st_size, "sha256": sha256(part)}}
        sealed = seal(entries | {"files": dict(sorted(files.items()))})

        def last(other: Path) -> None:
            other.write_text(json.dumps(sealed, indent=1), encoding="utf-8")
            os.replace(part, file)

        write_beside(manifest, last)

    write_beside(file, replace_both, rename=False)
    return file


def read(bundle: Bundle, path: Path, source: str) -> HeldOut:
    """The images of a file: of :func:`write`, or of ``parvis encode`` (``codes`` [M,h,w] in raster order).

    The file may come from anybody: no number in it is believed before it is compared with the bundle. Raises
    CalibrationError, RequestError.
    """
    arrays = _arrays(path)
    labels = arrays.get("labels")
    named = "tokens" if "tokens" in arrays else "codes"
    tokens = arrays.get(named)
    if tokens is None or labels is None:
        raise _unusable(
            path, f"it holds {', '.join(sorted(arrays)) or 'no array'}, not 'tokens' or 'codes' and 'labels'"
        )
    if named == "codes":
        grid = bundle.grid if bundle.video else bundle.grid[1:]
        if tokens.shape[1:] != grid:
            codes, what = "x".join(map(str, grid)), "clips" if bundle.video else "images"
            raise _unusable(path, f"its codes have shape {tokens.shape}; this bundle's {what} have {codes} codes")
        tokens = tokens.reshape(len(tokens), bundle.n_tokens)[:, list(bundle.order)]
    if tokens.ndim != 2 or tokens.shape[1] != bundle.n_tokens or not 1 <= len(tokens) <= MOST_IMAGES:
        raise _unusable(
            path, f"its tokens have shape {tokens.shape}; expected [M,{bundle.n_tokens}] with M of 1 or more"
        )
    if tokens.dtype.kind not in "iu" or labels.dtype.kind not in "iu" or labels.shape != (len(tokens),):
        raise _unusable(
            path,
            f"its labels have shape {labels.shape} and type {labels.dtype}, its tokens type {tokens.dtype}; expected "
            f"whole numbers, labels [{len(tokens)}]",
        )
    for what, values, count in (("tokens", tokens, bundle.vocab_size), ("labels", labels, _classes(bundle, arrays))):
        if values.min() < 0 or values.max() >= count:
            raise _unusable(path, f"its {what} lie in {values.min()}..{values.max()}; expected 0..{count - 1}")
    classes = _renamed(bundle, arrays, labels, path)
    return _in_turns(sequence_tokens(bundle, tokens), classes, source)


def from_pictures(bundle: Bundle, pictures: Pictures, encode: Callable[[Pixels], Int] | None = None) -> HeldOut:
    """Real ``pictures`` as tokens of ``bundle``'s own encoder; ``encode``: that of a pipeline that is loaded.

    Raises CalibrationError, RequestError, OSError.
    """
    if "encoder" not in bundle.graphs:
        raise CalibrationError(
            f"--real {pictures.source}: {bundle.path} has no encoder for pictures; give a .npz of 'parvis encode', or "
            "export the bundle with its encoder"
        )
    with ExitStack() as opened:
        if encode is None:
            encode = opened.enter_context(closing(Tokenizer(bundle))).encode
        tokens = np.concatenate([encode(pixels) for pixels in pictures.chunks()])
    return HeldOut(tokens, pictures.labels, pictures.source, real=True)


def _in_turns(tokens: Int, labels: Sequence[int], source: str) -> HeldOut:
    """The images so ordered that the classes take turns; those of one class stay in their order."""
    order = turns(labels)
    return HeldOut(tokens[order], tuple(int(labels[i]) for i in order), source, real=True)


def _classes(bundle: Bundle, arrays: dict[str, NDArray[Any]]) -> int:
    names = arrays.get("class_names")
    return bundle.n_classes if names is None else len(names)


def _renamed(bundle: Bundle, arrays: dict[str, NDArray[Any]], labels: NDArray[Any], path: Path) -> list[int]:
    """The bundle's class of each image: by the name in the file where both have names, else by number."""
    names = arrays.get("class_names")
    if names is None or bundle.class_names is None:
        if names is not None and labels.max() >= bundle.n_classes:
            raise _unusable(path, f"it has class {labels.max()}; this bundle has classes 0..{bundle.n_classes - 1}")
        return [int(label) for label in labels]
    used = {}
    for label in sorted(set(labels.tolist())):
        try:
            used[label] = class_index(bundle, str(names[label]))
        except RequestError as error:
            raise _unusable(path, str(error)) from None
    return [used[label] for label in labels.tolist()]


def _unusable(path: Path, why: str) -> CalibrationError:
    return CalibrationError(f"{shown_path(path)}: {why}; {HOW} with this bundle's tokenizer")


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file by name. Nothing in it is run, and nothing is unpacked beyond its limit."""
    content = read_regular(path, MOST_FILE_BYTES, lambda message: CalibrationError(advised(message, HOW)))
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            out = {}
            for name in ("tokens", "codes", "labels", "class_names"):
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as entry:
                        unpacked = entry.read(MOST_ARRAY_BYTES + 1)
                    out[name] = _array(unpacked)
            names = out.get("class_names")
            if names is not None and (names.ndim != 1 or not names.size or names.dtype.kind != "U"):
                raise ValueError(f"class_names of shape {shown(list(names.shape))} and type {shown(names.dtype.str)}")
            if names is not None:
                names.tolist()  # numbers that are no characters
            return out
    except Exception as error:  # numpy reads headers with Python's parser, which raises many kinds, as packers do
        why = str(error) or type(error).__name__
        raise _unusable(path, f"not a file of arrays ({shown(why)[1:-1]})") from None


def _array(content: bytes) -> NDArray[Any]:
    """The array of a ``.npy`` file of plain numbers or text. Raises ValueError.

    numpy's own reader allocates what the header claims before it looks whether the numbers are there.
    """
    if len(content) > MOST_ARRAY_BYTES:
        raise ValueError(f"an array of more than {MOST_ARRAY_BYTES} bytes")
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version}")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file, max_header_size=MOST_HEADER_BYTES)
    rest = content[file.tell() :]
    if dtype.kind not in "iuU" or dtype.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError(f"an array of type {shown(dtype.str)}")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"an array of shape {shown(list(shape))} in {len(rest)} bytes")
    values: NDArray[Any] = np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
    return values
