"""A part of the drawings, with more of the classes that a model draws worst.

    python subset.py --data ../../build/demo/train --out ../../build/demo/subset --start 36000 --more thumbs=2000

Takes all images from number ``--start`` on, and of each class of ``--more`` so many of those before it, the last ones.
They keep their order. A training that goes on sees drawings that it has seldom or never seen, and those classes more
often. ``--without`` names held-out drawings: what is equal to one of them is left out, so that they stay unseen. All
folders are as ``render.mjs`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from script import run

from par_model.system import naming
from par_model.training.cli import Parser
from par_model.training.files import InputError, folder_for, keep_inputs, written_together
from par_model.training.raw import IMAGES, RawImages
from par_model.words import printable


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Take a part of the drawings, with more of some classes.")
    p.add_argument("--data", type=Path, required=True, help="folder of images.u8, labels.u8, meta.json")
    p.add_argument("--out", type=Path, required=True, help="folder for the part, in the same form")
    p.add_argument("--start", type=int, required=True, metavar="I", help="number of the first image; they count from 0")
    p.add_argument(
        "--more", nargs="+", default=[], metavar="CLASS=COUNT", help="so many images of a class from before --start too"
    )
    p.add_argument(
        "--without",
        type=Path,
        metavar="HELD_OUT",
        help="folder of the same form; leave out what is equal to an image in it",
    )
    args = p.parse_args(argv)

    def work() -> int:
        folder_for("--out", args.out)
        outputs = (args.out / name for name in IMAGES)
        keep_inputs(f"--out {args.out}", outputs, data=args.data, without=args.without)
        raw = RawImages.open(args.data)
        chosen = chosen_images(raw, args.start, args.more)
        kept = chosen if args.without is None else without(raw, chosen, args.without)
        write(args.out, raw, kept)
        left_out = "" if args.without is None else f"; left out {len(chosen) - len(kept)} that {args.without} has too"
        print(printable(f"{args.out}: {len(kept)} images of {len(raw.labels)}{left_out}"))
        return 0

    return run("subset.py", work)


def chosen_images(raw: RawImages, start: int, more: Sequence[str]) -> NDArray[np.intp]:
    """The numbers of the images to take, ascending. Raises InputError."""
    if not 0 <= start < len(raw.labels):
        raise InputError(f"--start {start}: expected 0 to {len(raw.labels) - 1}, the number of an image")
    names = raw.meta["styles"]
    chosen = [np.arange(start, len(raw.labels))]
    given: set[str] = set()
    for text in more:
        name, _, digits = text.rpartition("=")
        count = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else 0
        if name not in names or name in given or count < 1:
            raise InputError(
                f"--more {text}: expected CLASS=COUNT, each class once, with a whole number from 1; classes are "
                f"{', '.join(names)}"
            )
        given.add(name)
        before = np.flatnonzero(raw.labels[:start] == names.index(name))
        if count > len(before):
            raise InputError(f"--more {text}: only {len(before)} images of {name} are before --start {start}")
        chosen.append(before[-count:])
    return np.sort(np.concatenate(chosen))


def without(raw: RawImages, chosen: NDArray[np.intp], held_out: Path) -> NDArray[np.intp]:
    """Those of the images ``chosen`` of ``raw`` that are equal to no image in the folder ``held_out``.

    Raises InputError where those are of another size, or where nothing is left; OSError.
    """
    other = RawImages.open(held_out)
    if other.images.shape[1:] != raw.images.shape[1:]:
        given, expected = ("x".join(map(str, images.shape[2:0:-1])) for images in (other.images, raw.images))
        raise InputError(f"--without {held_out}: holds images of {given} pixels; expected {expected}, as --data")
    digests = {hashlib.sha256(image).digest() for image in other.images}
    kept = chosen[[hashlib.sha256(raw.images[i]).digest() not in digests for i in chosen]]
    if not len(kept):
        raise InputError(f"--without {held_out}: holds every chosen image; give a lower --start, or other drawings")
    return kept


def write(out: Path, raw: RawImages, chosen: NDArray[np.intp]) -> None:
    """Write the ``chosen`` images of ``raw`` into the folder ``out``. Raises OSError."""
    images = raw.images[chosen]
    meta = {**raw.meta, "count": len(chosen), "images_sha256": hashlib.sha256(images).hexdigest()}
    files = {
        "images.u8": images.data,
        "labels.u8": raw.labels[chosen].tobytes(),
        "meta.json": json.dumps(meta).encode(),
    }
    with written_together(*(out / name for name in files)) as parts:
        for part, content in zip(parts, files.values(), strict=True):
            with naming(part):
                part.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
