"""``--preview-every``: files of unfinished images beside ``--out``, checked before the work, which they never end."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.cli.common import Bar, printable
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.system import HALF, check_writable, explain, same_file

Pixels = NDArray[np.uint8]


def preview_file(out: Path, done: int) -> Path:
    """The preview of ``out`` after ``done`` calls."""
    return out.with_name(f"{out.stem}-{done:04d}.png")


def check_previews(args: argparse.Namespace, bundle: Bundle, images: int, batch: int, others: Sequence[Path]) -> None:
    """Check the names of the previews of ``images``, of which ``batch`` are made at once: none is another file of this
    command, as ``others`` are, and each can be written. Raises RequestError, OSError.

    There may be more previews than names can be tried, so those of the files that are there are compared with theirs.
    """
    if args.preview_every is None:
        return
    calls = bundle.calls * math.ceil(images / batch)
    out: Path = args.out

    def is_preview(name: str) -> bool:
        number = re.fullmatch(r"-([0-9]{4,18})\.png", name.removeprefix(out.stem))
        done = int(number[1]) if number and name.startswith(out.stem) else 0
        return 0 < done <= calls and done % args.preview_every == 0 and preview_file(out, done).name == name

    for other in others:
        if is_preview(other.name) and same_file(other.parent, out.parent):
            raise RequestError(f"{other}: a preview of this command has this name too; give another --out")
    if calls >= args.preview_every:  # the last name is the longest
        check_writable(preview_file(out, calls - calls % args.preview_every))
    if out.parent.is_dir():
        for name in sorted(filter(is_preview, os.listdir(out.parent))):
            check_writable(out.with_name(name))


class Previews:
    """Writes previews, of sheets with ``columns``; one that cannot be written is one warning, and the images go on."""

    def __init__(self, args: argparse.Namespace, bundle: Bundle, columns: int, bar: Bar) -> None:
        self._args, self._video, self._columns, self._bar = args, bundle.video, columns, bar
        self._warned = False

    def __call__(self, images: Pixels, done: int, total: int) -> None:
        """``on_preview`` of :meth:`par_runtime.Pipeline.generate`."""
        if self._video:  # the latest frame
            images = images[:, -1]
        sheet = png.enlarged(png.sheet(images, self._columns), self._args.scale)
        try:
            png.write_pixels(preview_file(self._args.out, done), sheet)
        except OSError as error:
            if not self._warned:  # a disk that is full is so at the next one too
                self._bar.clear()
                why = printable(explain(error).removesuffix(HALF))
                print(f"parvis: warning: a preview was not written ({why}); the images go on", file=sys.stderr)
            self._warned = True
