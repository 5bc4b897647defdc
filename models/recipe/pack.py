"""Training images in few bytes, to take them to a machine with a GPU: about 150 bytes an image of 12,288.

    python pack.py --train ../../build/demo/train --val ../../build/demo/val --out ../../build/demo/pack

Both folders are as ``render.mjs`` writes them. OUT/train and OUT/val hold a file of xz for each class, whose images
repeat each other's parts. Images of the validation set that are equal to one of the training set are left out, so that
what a training says about held-out images is about images that it has not seen. ``gpu.py`` unpacks them again; this
file needs only numpy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from par_model.system import naming
from par_model.training.cli import Parser
from par_model.training.files import InputError, folder_for, keep_inputs, regular, written_together
from par_model.training.raw import IMAGES, RawImages, read_meta, shown
from par_model.words import printable

#: xz keeps this much of a class in mind, at most; a repetition that lies further back costs its bytes again.
DICTIONARY = 2**28
PIECE = 256  #: images that are compressed or unpacked at once


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Pack training and validation images for gpu.py.")
    p.add_argument("--train", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--val", type=Path, required=True, help="the same of other images")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--preset", type=int, default=3, help="of xz, 0 to 9; a higher one is slower (default 3)")
    p.add_argument(
        "--at-once", type=int, default=2, help="classes packed at once; each takes 2 GB of memory (default 2)"
    )
    args = p.parse_args(argv)
    from script import run  # gpu.py imports this module where only PyTorch and numpy are

    return run("pack.py", lambda: packed(args))


def packed(args: argparse.Namespace) -> int:
    """Check and pack; returns the exit code. Raises InputError, OSError."""
    check(args)
    train, val = RawImages.open(args.train), RawImages.open(args.val)
    seen = {digest(image) for image in train.images}
    fresh = np.array([digest(image) not in seen for image in val.images], bool)
    for key in ("size", "styles"):
        if train.meta[key] != val.meta[key]:
            raise InputError(
                f"--val {args.val}: {key} is {shown(val.meta[key])}, that of --train {args.train} is "
                f"{shown(train.meta[key])}; give images of the same size and classes"
            )
    if not fresh.any():
        raise InputError(f"--val {args.val}: every image of it is in --train {args.train} too; give other images")
    try:
        # Renamed when both are whole: with one of another pack, images of the training may be those of the validation.
        with ExitStack() as whole:
            made = pack(whole, args.out / "train", train, np.arange(len(train.images)), args.preset, args.at_once)
            made += pack(whole, args.out / "val", val, np.flatnonzero(fresh), args.preset, args.at_once)
        for old in args.out.glob("*/[0-9][0-9][0-9].xz"):  # of classes that an earlier pack had
            if old.parent.name in ("train", "val") and old not in made:
                old.unlink()
    except MemoryError:
        raise InputError("not enough memory; give --at-once 1 or a lower --preset") from None
    size = sum(file.stat().st_size for name in ("train", "val") for file in (args.out / name).iterdir())
    print(
        printable(
            f"{args.out}: {len(train.images)} images for the training, {fresh.sum()} of {len(fresh)} for validation "
            f"(the others are equal to one of the training), {size / 1e6:.1f} MB"
        )
    )
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise InputError for numbers out of their limits, and for an output that would spoil images."""
    if not 0 <= args.preset <= 9:
        raise InputError(f"--preset {args.preset}: expected a whole number from 0 to 9")
    if not 1 <= args.at_once <= 256:
        raise InputError(f"--at-once {args.at_once}: expected a whole number from 1 to 256")
    for option, folder in (("--train", args.train), ("--val", args.val)):
        if not folder.is_dir():
            raise InputError(f"{option} {folder}: no such folder; expected one of {', '.join(IMAGES)}")
    folder_for("--out", args.out)
    outputs = [args.out / "train", args.out / "val"]
    keep_inputs(f"--out {args.out}", outputs, train=args.train, val=args.val)
    for output in outputs:
        folder_for("--out", output)
        if (output / IMAGES[0]).exists():
            raise InputError(f"--out {args.out}: {output} holds raw images, whose meta.json would be lost")


def digest(image: NDArray[np.uint8]) -> bytes:
    """A number of 16 bytes that two different images do not share."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def pack(
    whole: ExitStack, out: Path, raw: RawImages, chosen: NDArray[np.intp], preset: int, at_once: int
) -> list[Path]:
    """Pack the images at ``chosen``, a file for each class, which become those of the folder ``out`` where ``whole``
    ends without an error. Returns the files. Raises OSError.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": DICTIONARY}]
    labels = raw.labels[chosen]

    def one(label: int, part: Path) -> None:
        packer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
        index = chosen[labels == label]
        with naming(part), part.open("wb") as file:
            for start in range(0, len(index), PIECE):
                file.write(packer.compress(raw.images[index[start : start + PIECE]].tobytes()))
            file.write(packer.flush())

    classes = np.unique(labels).tolist()
    about = {key: value for key, value in raw.meta.items() if key != "images_sha256"}
    text = json.dumps(about | {"count": len(chosen)}, indent=1)
    names = [*(f"{label:03}.xz" for label in classes), "labels.xz", "meta.json"]
    files = [out / name for name in names]
    *parts, labels_part, meta_part = whole.enter_context(written_together(*files))
    for part, content in ((labels_part, lzma.compress(labels.tobytes())), (meta_part, text.encode())):
        with naming(part):
            part.write_bytes(content)
    with ThreadPoolExecutor(at_once) as pool:  # lzma works outside the interpreter's lock
        for done in [pool.submit(one, label, part) for label, part in zip(classes, parts, strict=True)]:
            done.result()
    return files


def unpack(packed: Path, out: Path, check: Callable[[], None] = lambda: None) -> int:
    """Write the images in ``packed`` to ``out`` in the form that the trainers read, in their old order.

    Returns how many. Raises what ``check()``, which is called again and again, raises to end it early; InputError (a
    file that is cut off, damaged, or of other images); OSError. In all these cases ``out`` stays as it was.
    """
    meta = read_meta(packed, "count", "size", names="styles")
    size = meta["size"]
    labels = unpacked_labels(packed, meta)
    shape = (len(labels), size, size, 3)
    with written_together(*(out / name for name in IMAGES)) as (images_part, labels_part, meta_part):
        allocate(images_part, math.prod(shape))
        fill(np.memmap(images_part, np.uint8, mode="r+", shape=shape), labels, packed, check)
        for part, content in ((labels_part, labels.tobytes()), (meta_part, json.dumps(meta).encode())):
            with naming(part):
                part.write_bytes(content)
    return len(labels)


def fill(images: np.memmap, labels: NDArray[np.uint8], packed: Path, check: Callable[[], None]) -> None:
    """Unpack the images of every class in the folder ``packed`` to their places in ``images``. Raises InputError."""
    size = images.shape[1]

    def one(label: int) -> None:
        path, index = packed / f"{label:03}.xz", np.flatnonzero(labels == label)
        what = f"{len(index)} images of {size}x{size} pixels, which labels.xz and meta.json say"
        try:
            with lzma.open(regular(path)) as file:
                for start in range(0, len(index), PIECE):
                    check()
                    piece = index[start : start + PIECE]
                    content = file.read(len(piece) * size * size * 3)
                    if len(content) != len(piece) * size * size * 3:
                        raise InputError(f"{path}: holds less than {what}; take the whole folder here again")
                    images[piece] = np.frombuffer(content, np.uint8).reshape(-1, size, size, 3)
                if file.read(1):
                    raise InputError(f"{path}: holds more than {what}; take the whole folder here again")
        except (lzma.LZMAError, EOFError) as error:
            raise InputError(f"{path}: cut off or damaged ({error}); take it here again") from error

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, np.unique(labels).tolist()))
    images.flush()


def unpacked_labels(packed: Path, meta: dict[str, Any]) -> NDArray[np.uint8]:
    """The labels in the folder ``packed``. Raises InputError where they do not fit its ``meta``, OSError."""
    path, count, names = packed / "labels.xz", meta["count"], meta["styles"]
    try:
        with lzma.open(regular(path)) as file:
            labels = np.frombuffer(file.read(count + 1), np.uint8)
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: cut off or damaged ({error}); take it here again") from error
    if len(labels) != count:
        given = f"more than {count}" if len(labels) > count else str(len(labels))
        raise InputError(f"{path}: holds {given} labels, meta.json has count {count}; take both here again")
    if labels.max() >= len(names):
        raise InputError(f"{path}: holds label {labels.max()}, meta.json {len(names)} styles; take both here again")
    return labels


def allocate(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that are really there: a disk that is full later would end the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                why = f"{error.strerror} for {size / 1e6:.0f} MB of unpacked images; give a folder with more room"
                raise OSError(error.errno, why, str(path)) from error
        else:
            file.truncate(size)


if __name__ == "__main__":
    sys.exit(main())
