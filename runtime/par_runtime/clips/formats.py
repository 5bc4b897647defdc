"""The kinds of file that hold a clip: how their names end, what they can keep, and what is checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from par_runtime.arguments import number
from par_runtime.checked import shown, shown_path
from par_runtime.errors import RequestError
from par_runtime.images.opening import MOST_PIXELS
from par_runtime.images.png import MOST_SIDE, check_sheet, sheet_size

DEFAULT_FPS = 8.0  #: frames per second; ours, because a model does not say how fast its clips are
MOST_FPS = 60.0


@dataclass(frozen=True)
class Format:
    """A kind of file. ``tick_ms``: what the time of a frame is a multiple of; None where any rate is kept exactly."""

    name: str
    lossless: bool
    most_side: int  #: pixels
    most_fps: float = MOST_FPS
    tick_ms: int | None = 1


_APNG = Format("an animated PNG", True, MOST_SIDE)
#: An animated PNG may have either name: programs that do not know it show its first frame.
FORMATS = {
    ".gif": Format("GIF", False, MOST_SIDE, 50.0, 10),  # browsers slow down what is faster
    ".webp": Format("WebP", True, 16383),
    ".apng": _APNG,
    ".png": _APNG,
    ".mp4": Format("MP4", False, 4096, tick_ms=None),  # the largest that decoders of H.264 in hardware take
}
ENDINGS = ".gif, .webp, .apng (or .png) or .mp4"
#: Players show smaller videos badly or not at all, and colours of H.264 are kept for squares of two pixels a side.
LEAST_MP4_SIDE = 128


def format_of(path: Path, option: str = "path") -> Format:
    """The format of a clip's file by its name. Raises RequestError."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise RequestError(f"{option} {shown_path(path)}: expected a name of a clip, which ends in {ENDINGS}")
    return found


def check_fps(fps: object, path: Path | None = None) -> float:
    """``fps``, frames per second, as a float; for the file ``path``. Raises RequestError."""
    most = MOST_FPS if path is None else format_of(path).most_fps
    value = number("fps", fps, 1, MOST_FPS, f"1 to {most:g} frames per second")
    return number("fps", value, 1, most, f"1 to {most:g} frames per second of a GIF: browsers slow down faster ones")


def mp4_scale(size: tuple[int, int], scale: int) -> int:
    """The scale of an MP4 of clips of ``size`` (H, W): ``scale``, or a multiple of it that players show well.

    Sides are even then, and the smaller one has at least :data:`LEAST_MP4_SIDE` pixels.
    """
    times = max(1, math.ceil(LEAST_MP4_SIDE / (min(size) * scale)))
    odd = any(side * scale % 2 for side in size)
    return scale * (times + times % 2 if odd else times)


def check_clips(path: Path, count: int, columns: int, frames: int, size: tuple[int, int], scale: int = 1) -> None:
    """Raise RequestError where a sheet of ``count`` clips of ``size`` (H, W) fits no file of the kind of ``path``.

    To be called before any clip is made. ``scale``: as it was asked for.
    """
    kind = format_of(path)
    if kind.tick_ms is None:
        scale = mp4_scale(size, scale)
    size = size[0] * scale, size[1] * scale
    check_sheet(count, columns, size)
    height, width = sheet_size(count, columns, size)
    if max(height, width) > kind.most_side or frames * height * width > MOST_PIXELS:
        raise RequestError(
            f"{count} clips in {columns} columns are {frames} frames of {shown(width)}x{shown(height)} pixels; "
            f"expected at most {kind.most_side} on a side in {kind.name} and {MOST_PIXELS} in all: give other columns, "
            "fewer clips, a smaller scale, or one file each (--out-dir)"
        )


def times_ms(frames: int, fps: float, tick_ms: int = 1) -> list[int]:
    """How long each of ``frames`` is shown, in whole ticks whose sum is as near as can be to what ``fps`` asks for."""
    ends = [round(i * 1000 / fps / tick_ms) for i in range(frames + 1)]
    return [(b - a) * tick_ms for a, b in pairwise(ends)]


def repeats(seconds: Sequence[float], fps: float | None, where: str) -> list[int]:
    """How many frames of even length each stored frame stands for, by the ``seconds`` that it is shown.

    Writers join equal frames into one that is shown for longer. ``fps``: of a clip of parvis; else the shortest frame
    is taken as one. Raises RequestError where no even rate fits.
    """
    if fps is not None:
        ends, at = [0], 0.0
        for each in seconds:
            at += each
            ends.append(round(at * fps))
        return [b - a for a, b in pairwise(ends)]
    known = [each for each in seconds if each > 0]
    if len(known) < len(seconds) or not known:
        return [1] * len(seconds)  # a rate that nobody has stated
    unit = min(known)
    counts = [round(each / unit) for each in seconds]
    # One tick of a GIF is 10 ms, and cameras are a little uneven.
    uneven = [each for each, k in zip(seconds, counts, strict=True) if abs(each - k * unit) > max(0.011, 0.2 * unit)]
    if uneven:
        raise RequestError(
            f"{where}: its frames are shown for {1000 * unit:.0f} ms and for {1000 * uneven[0]:.0f} ms, so it has no "
            "even number of frames per second; convert it (ffmpeg -i IN -r 8 OUT.mp4)"
        )
    return counts
