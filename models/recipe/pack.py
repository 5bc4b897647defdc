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
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: xz keeps this much of a class in mind, at most; a repetition that lies further back costs its bytes again.
DICTIONARY = 2**28
PIECE = 256  #: images that are compressed or unpacked at once


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Pack training and validation images for gpu.py.")
    p.add_argument("--train", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--val", type=Path, required=True, help="the same of other images")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--preset", type=int, default=3, help="of xz, 0 to 9; a higher one is slower (default 3)")
    p.add_argument(
        "--at-once", type=int, default=2, help="classes packed at once; each takes 2 GB of memory (default 2)"
    )
    args = p.parse_args(argv)
    try:
        train, labels, meta = opened(args.train)
        held_out, held_out_labels, held_out_meta = opened(args.val)
        seen = {digest(image) for image in train}
        fresh = np.array([digest(image) not in seen for image in held_out], bool)
        pack(args.out / "train", train, np.arange(len(train)), labels, meta, args.preset, args.at_once)
        pack(
            args.out / "val", held_out, np.flatnonzero(fresh), held_out_labels, held_out_meta, args.preset, args.at_once
        )
    except (OSError, KeyError, ValueError) as error:
        print(f"pack.py: error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in args.out.glob("*/*"))
    print(
        f"{args.out}: {len(train)} images for the training, {fresh.sum()} of {len(fresh)} for validation (the others "
        f"are equal to one of the training), {size / 1e6:.1f} MB"
    )
    return 0


def opened(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, object]]:
    """Images [M,H,W,3], memory-mapped, labels [M] and what ``meta.json`` says. Raises OSError, KeyError, ValueError."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    shape = (meta["count"], meta["size"], meta["size"], 3)
    images = np.memmap(folder / "images.u8", np.uint8, mode="r", shape=shape)
    labels = np.fromfile(folder / "labels.u8", np.uint8)
    if len(labels) != len(images):
        raise ValueError(f"{folder} has {len(images)} images and {len(labels)} labels; render it again")
    return images, labels, meta


def digest(image: NDArray[np.uint8]) -> bytes:
    """A number of 16 bytes that two different images do not share."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def pack(
    out: Path,
    images: NDArray[np.uint8],
    chosen: NDArray[np.intp],
    labels: NDArray[np.uint8],
    meta: dict[str, object],
    preset: int,
    at_once: int,
) -> None:
    """Write the images at ``chosen`` to the folder ``out``, a file for each class. Raises OSError, ValueError."""
    out.mkdir(parents=True, exist_ok=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": DICTIONARY}]

    def one(label: int) -> None:
        packer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
        index = chosen[labels[chosen] == label]
        with (out / f"{label:03}.xz").open("wb") as file:
            for start in range(0, len(index), PIECE):
                file.write(packer.compress(images[index[start : start + PIECE]].tobytes()))
            file.write(packer.flush())

    with ThreadPoolExecutor(at_once) as pool:  # lzma works outside the interpreter's lock
        list(pool.map(one, np.unique(labels[chosen]).tolist()))
    (out / "labels.xz").write_bytes(lzma.compress(labels[chosen].tobytes()))
    about = {key: value for key, value in meta.items() if key != "images_sha256"}
    (out / "meta.json").write_text(json.dumps(about | {"count": len(chosen)}, indent=1), encoding="utf-8")


def unpack(packed: Path, out: Path) -> int:
    """Write the images in ``packed`` to ``out`` in the form that the trainers read, in their old order.

    Returns how many. Raises OSError, ValueError (a file that is cut off or damaged).
    """
    meta = json.loads((packed / "meta.json").read_text(encoding="utf-8"))
    size = int(meta["size"])
    out.mkdir(parents=True, exist_ok=True)
    labels = np.frombuffer(lzma.decompress((packed / "labels.xz").read_bytes()), np.uint8)
    images = np.memmap(out / "images.u8", np.uint8, mode="w+", shape=(len(labels), size, size, 3))

    def one(label: int) -> None:
        path = packed / f"{label:03}.xz"
        index = np.flatnonzero(labels == label)
        try:
            with lzma.open(path) as file:
                for start in range(0, len(index), PIECE):
                    part = index[start : start + PIECE]
                    images[part] = np.frombuffer(file.read(len(part) * size * size * 3), np.uint8).reshape(
                        -1, size, size, 3
                    )
        except (lzma.LZMAError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: cut off or damaged ({error}); take it here again") from error

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, np.unique(labels).tolist()))
    labels.tofile(out / "labels.u8")
    (out / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return len(labels)


if __name__ == "__main__":
    sys.exit(main())
