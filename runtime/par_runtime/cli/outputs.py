"""The files that several verbs write: their names, checks before any work is spent, and arrays of tokens."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.cli.common import printable
from par_runtime.clips import formats, mp4
from par_runtime.clips.files import is_animation
from par_runtime.clips.formats import format_of
from par_runtime.dtypes import Int
from par_runtime.errors import OutputsError, RequestError
from par_runtime.images import png
from par_runtime.result import Result, default_columns
from par_runtime.system import HALF, check_different, check_writable, explain, same_file, write_beside

if TYPE_CHECKING:
    from par_runtime.pipeline import Pipeline


def check_outputs(
    bundle: Bundle, out: Path, tokens: Path | None, inputs: Sequence[Path] = (), recipe: bool = True
) -> None:
    """Check the names of a file of images or clips and of an array of tokens, and that both can be written.

    ``inputs``: the files that the verb reads, which it must not replace. ``recipe``: as of :func:`check_out_name`.
    Raises RequestError, OSError.
    """
    check_out_name(bundle, out, recipe)
    check_tokens_name(tokens)
    check_different([out, *([tokens] if tokens else [])])
    for option, path in (("--out", out), ("--tokens", tokens)):
        if path is not None:
            check_not_input(path, inputs, option)
            check_writable(path)


def check_out_name(bundle: Bundle, out: Path | None, recipe: bool = True) -> None:
    """Raise RequestError where ``--out`` is given and is no name of what ``bundle`` makes: images or clips.

    ``recipe``: the file holds what makes its images again.
    Also where the writer of such clips is not installed, so that nobody waits for clips that cannot be written.
    """
    if out is None or out.is_dir():  # a folder is named by who writes
        return
    if bundle.video:
        format_of(out, "--out")
        if out.suffix.lower() == ".mp4":
            mp4.library()
    elif out.suffix.lower() != ".png":
        why = " (what makes an image again is kept in its metadata)" if recipe else ""
        raise RequestError(f"--out {out}: expected a name that ends in .png{why}")


def check_fps(bundle: Bundle, fps: float | None, outs: Sequence[Path | None]) -> None:
    """Raise RequestError for a wrong ``--fps``; ``outs``: the files of clips, None for one of the default ending."""
    if fps is None:
        return
    if not bundle.video:
        raise RequestError(f"--fps {fps:g}: {bundle.path} makes images, not clips; leave it out")
    for out in outs:
        formats.check_fps(fps, out or Path(f"clip{suffix_of(bundle)}"))


def check_sheet(bundle: Bundle, out: Path | None, count: int, columns: int, scale: int) -> None:
    """Raise RequestError where ``count`` images or clips of ``bundle`` in ``columns`` are no file to be opened.

    ``out``: its name, None where it has the default ending. Nothing to say of a bundle that ends at tokens.
    """
    if bundle.image_size is None:
        return
    if bundle.video:
        name = Path(f"clip{suffix_of(bundle)}") if out is None or out.is_dir() else out
        formats.check_clips(name, count, columns, bundle.frames, bundle.image_size, scale)
    else:
        png.check_sheet(count, columns, (bundle.image_size[0] * scale, bundle.image_size[1] * scale))


def suffix_of(bundle: Bundle) -> str:
    """How the names of files end that nobody has named."""
    return ".gif" if bundle.video else ".png"


def report_edited(
    args: argparse.Namespace,
    pipeline: Pipeline,
    result: Result,
    keep: NDArray[np.bool_],
    encoded_because: str | None,
    started: float,
    written: str | list[str],
    **more: object,
) -> None:
    """Print what ``parvis edit`` made, as text or JSON; nothing with ``--quiet``.

    ``encoded_because``: why the tokens that stay were made of pixels; None where they are those that made it.
    ``started``: by ``time.perf_counter``. ``more``: further entries of the JSON.
    """
    bundle, count = pipeline.bundle, len(result)
    if args.json:
        row = {
            "written": written,
            "bundle": {"name": bundle.name, "hash": bundle.hash},
            "backend": pipeline.backend.info.name,
            "decoder": pipeline.backend.info.decoder,
            "label": result.labels[0],
            "seeds": result.seeds,
            "kept_tokens": int(keep.sum()),
            "tokens": keep.size,
            "encoded": encoded_because is not None,
            "encoded_because": encoded_because,
            **more,
            "timings_ms": result.timings,
        }
        print(json.dumps(row))
    elif not args.quiet:
        name = str(result.labels[0]) if bundle.class_names is None else bundle.class_names[result.labels[0]]
        variants = f"{bundle.kind}s" if count > 1 else bundle.kind
        how = " as they were generated" if encoded_because is None else ""
        out = written if isinstance(written, str) else written[0]
        print(
            f"{printable(out)}: {count} {variants} of {name}, {seeds_in_words(result.seeds)}, {int(keep.sum())} of "
            f"{keep.size} tokens kept{how}, in {time.perf_counter() - started:.1f} s"
        )


def seeds_in_words(seeds: Sequence[int]) -> str:
    """``seed 1``, or ``seeds 1..4``."""
    low, high = min(seeds), max(seeds)
    return f"seeds {low}..{high}" if high > low else f"seed {low}"


def say_of_animations(paths: Sequence[Path]) -> None:
    """Print that of each of ``paths`` that moves one frame is taken: a user may have meant the clip."""
    for path in paths:
        if is_animation(path):
            print(printable(f"parvis: {path}: moves; its first frame is taken, as a picture"), file=sys.stderr)


def check_not_input(out: Path, inputs: Sequence[Path], option: str = "--out") -> None:
    """Raise RequestError where ``out`` is one of the files that the verb reads, by whatever name."""
    for path in inputs:
        if path.exists() and same_file(out, path):
            raise RequestError(f"{option} {out} is the file that is read; give another name, so that it is not lost")


def write_all(files: Sequence[tuple[Path, Callable[[], object]]]) -> list[str]:
    """Write ``files`` one after the other, each by its function; their names.

    Raises OutputsError where some are written and the next one cannot be; OSError where the first one cannot be.
    """
    written: list[str] = []
    for path, write in files:
        try:
            write()
        except OSError as error:
            if not written:
                raise
            raise OutputsError(
                f"{explain(error).removesuffix(HALF)}; {len(written)} of {len(files)} files were written, the last is "
                f"{written[-1]}"
            ) from error
        written.append(str(path))
    return written


def check_tokens_name(tokens: Path | None) -> None:
    """Raise RequestError where ``--tokens`` is given and its name does not end in .npy."""
    if tokens is not None and tokens.suffix != ".npy":
        raise RequestError(f"--tokens {tokens}: expected a name that ends in .npy")


def write_tokens(path: Path, tokens: Int) -> None:
    """Write ``tokens`` [B,N] as .npy, beside ``path`` and renamed. Raises OSError."""

    content = io.BytesIO()  # NumPy would hide why a file could not be written ("0 requested and 0 written")
    np.save(content, tokens)
    write_beside(path, lambda part: part.write_bytes(content.getbuffer()))


def sheet_columns(bundle: Bundle, classes: int, count: int, scales: int) -> int:
    """Images or clips per row of a sheet of ``count`` per class and guidance scale.

    Several scales get a row each. Several classes share a row until the sheet is about square; one class is laid out
    as a square.
    """
    if scales > 1:
        return classes * count
    if classes == 1 or (bundle.video and count == 1):
        return default_columns(classes * count, bundle.video)
    # Classes in rows of `count` each would be tall and thin.
    per_row = max(1, round(math.sqrt(classes * count) / count))
    return count * min(per_row, classes)


def class_file_name(bundle: Bundle, label: int) -> str:
    """Class ``label`` as a part of a file name: its first name, or its index where no character of that is allowed."""
    name = "" if bundle.class_names is None else safe_name(bundle.class_names[label].split(", ")[0])
    return name or str(label)


def image_file_names(
    bundle: Bundle, labels: Sequence[int], seeds: Sequence[int], guidance: Sequence[float] | None
) -> list[str]:
    """A file name for each image; ``guidance`` [B] is a part of it where images have several scales."""
    scales = set(guidance or ())
    short = len({f"{scale:g}" for scale in scales}) == len(scales)
    names = []
    for i, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        scale = "" if guidance is None or len(scales) < 2 else f"-g{guidance[i]:g}" if short else f"-g{guidance[i]!r}"
        names.append(f"{class_file_name(bundle, label)}-{seed}{scale}{suffix_of(bundle)}")
    return names


def safe_name(name: str) -> str:
    """``name`` with only those characters that are allowed in the file names of every system, at most 80 bytes."""
    text = re.sub(r"[^\w.-]+", "-", name).strip("-.").encode()[:80].decode(errors="ignore")
    return os.fsdecode(text.encode())  # the same bytes on a system that is not set to UTF-8
