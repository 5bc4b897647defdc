"""Files of clips: a sheet of clips that play together, written with their recipe, and any clip read.

What a file claims is checked before it is decoded, as for pictures, and every frame as it comes: a file may have been
made to do harm.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from par_runtime.arguments import whole
from par_runtime.checked import open_regular, shown, shown_path, why_not_regular
from par_runtime.clips import animated, mp4
from par_runtime.clips.formats import check_clips, check_fps, format_of, mp4_scale, repeats
from par_runtime.errors import RequestError
from par_runtime.images.opening import MOST_FILE_BYTES, MOST_PIXELS
from par_runtime.images.pillow import quiet, ready
from par_runtime.images.png import enlarged, sheet, sheet_image, sheet_size
from par_runtime.images.recipe import Recipe, entry, parse, pixel_hash
from par_runtime.reading import REMEDIES, advised, unreadable
from par_runtime.system import write_beside

EXPECTED = "expected a clip as GIF, WebP, animated PNG or MP4"
OTHERS = "convert another kind of video (ffmpeg -i IN OUT.mp4)"
Fitted = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
Stored = NDArray[np.uint8] | animated.FewColours  #: frames [T,H,W,3], as the kind of file has them


@dataclass(frozen=True, eq=False)
class ClipFile:
    """What a file shows: ``frames`` [T,H,W,3], without the enlargement that parvis wrote it with.

    ``recipe``: of a file that parvis wrote; its ``pixel_hashes`` are "" for clips that were changed since. None for
    any other file.
    """

    frames: NDArray[np.uint8]
    recipe: Recipe | None = None

    def clips(self, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """The clips [B,T,H,W,3] of ``size`` (H, W) of a recipe; None where the file has another size."""
        recipe = self.recipe
        if recipe is None or self.frames.shape[1:3] != sheet_size(len(recipe), recipe.columns, size):
            return None
        return np.stack([_clip(self.frames, recipe, i) for i in range(len(recipe))])


def _clip(frames: NDArray[np.uint8], recipe: Recipe, index: int) -> NDArray[np.uint8]:
    """Clip ``index`` [T,H,W,3] of the frames of a sheet."""
    return np.stack([sheet_image(frame, recipe.columns, len(recipe), index) for frame in frames])


def sheets(clips: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """``clips`` [B,T,H,W,3] as the frames [T,rows*H,columns*W,3] of one sheet."""
    return np.stack([sheet(clips[:, t], columns) for t in range(clips.shape[1])])


# -- writing ----------------------------------------------------------------------------------------------------------


def content(path: Path, recipe: Recipe, clips: NDArray[np.uint8]) -> bytes:
    """``clips`` [B,T,H,W,3] as one sheet that plays, with their recipe. Raises RequestError.

    The kind of file is that of the name ``path``. The same clips and recipe give the same bytes.
    """
    size = (clips.shape[2], clips.shape[3])
    check_clips(path, len(clips), recipe.columns, clips.shape[1], size, recipe.scale)
    fps = check_fps(recipe.fps, path)
    recipe = replace(recipe, scale=_scale_of(path, size, recipe.scale), frames=clips.shape[1])
    frames = _stored(path, sheets(clips, recipe.columns))
    kept = _as_kept(path, frames, fps, recipe.scale)
    hashes = [pixel_hash(each) for each in _hashed(kept, recipe)]
    return _encoded(path, frames, fps, recipe.scale, json.dumps(entry(replace(recipe, pixel_hashes=hashes))))


def write_frames(path: Path, frames: NDArray[np.uint8], fps: float, scale: int = 1) -> None:
    """Write ``frames`` [T,H,W,3] as a clip without a recipe. Raises RequestError, OSError."""
    size = (frames.shape[1], frames.shape[2])
    check_clips(path, 1, 1, len(frames), size, scale)
    data = _encoded(path, _stored(path, frames), check_fps(fps, path), _scale_of(path, size, scale), "")
    write_beside(path, lambda part: part.write_bytes(data))


def _scale_of(path: Path, size: tuple[int, int], scale: int) -> int:
    """The scale that a file of the kind of ``path`` is written with, where ``scale`` is asked for."""
    return mp4_scale(size, scale) if format_of(path).tick_ms is None else scale


def _stored(path: Path, frames: NDArray[np.uint8]) -> Stored:
    """``frames`` [T,H,W,3], in few colours where the kind of ``path`` has no more."""
    return animated.few_colours(frames) if path.suffix.lower() == ".gif" else frames


def _encoded(path: Path, frames: Stored, fps: float, scale: int, text: str) -> bytes:
    """``frames``, enlarged, as the bytes of a file of the kind of ``path``, which holds ``text``."""
    if isinstance(frames, animated.FewColours):
        return animated.as_gif(frames, scale, fps, text)
    ending = path.suffix.lower()
    if ending == ".mp4":
        return mp4.encoded(np.stack([enlarged(each, scale) for each in frames]), fps, text)
    return (animated.as_webp if ending == ".webp" else animated.as_apng)(frames, scale, fps, text)


def _as_kept(path: Path, frames: Stored, fps: float, scale: int) -> NDArray[np.uint8]:
    """What reading the file will give, to be hashed: the frames, or the planes of an MP4 [T,3*H/2,W]."""
    if isinstance(frames, animated.FewColours):
        return frames.frames
    if path.suffix.lower() == ".mp4":
        with mp4.opened(io.BytesIO(_encoded(path, frames, fps, scale, ""))) as video:
            video.keep_planes = True
            for _ in video:
                pass
            return np.stack(video.planes)
    return frames


def _hashed(kept: NDArray[np.uint8], recipe: Recipe) -> Iterator[NDArray[np.uint8]]:
    """The part of each clip of what reading gives, for :func:`pixel_hash`."""
    for i in range(len(recipe)):
        if kept.ndim == 4:
            yield _clip(kept, recipe, i)
        else:  # brightness in full, colours at half the size, which lie below: H.264 decodes these alike everywhere
            height = kept.shape[1] * 2 // 3
            bright, colours = kept[:, :height], kept[:, height:].reshape(len(kept), 2, height // 2, -1)
            planes = [bright, colours[:, 0], colours[:, 1]]
            parts = [_clip(plane, recipe, i).reshape(len(kept), -1) for plane in planes]
            yield np.concatenate(parts, 1)[:, None, :, None]


# -- reading ----------------------------------------------------------------------------------------------------------


def read_any(path: Path, count: int, start: int = 0, fit: Fitted | None = None) -> ClipFile:
    """The frames of any clip, and its recipe if parvis wrote it.

    Of a file of parvis all frames of its sheet are read. Of any other file at most ``count`` frames from ``start`` on,
    each ``fit`` as it comes; there may be fewer, at least one. Raises RequestError, OSError.
    """
    path = Path(path)
    start = whole("start", start, 0, 10**6, ", the first frame that is taken")
    with _source(path) as source:
        width, height = source.size
        if source.text is not None:
            recipe = parse(source.text, str(path))
            if recipe.fps is not None:
                _check_pixels(path, recipe.frames, width, height)
                return _of_parvis(path, source, recipe)
        _check_pixels(path, count, width, height)
        frames, seconds = [], []
        for frame, shown_for in source:
            frames.append(frame if fit is None else fit(frame))
            seconds.append(shown_for)
            if len(frames) >= start + count:
                break
    if not frames:
        raise RequestError(f"{shown_path(path)}: holds no frame; {EXPECTED}")
    each = repeats(seconds, None, shown_path(path))
    every = [i for i, k in enumerate(each) for _ in range(min(k, start + count))][start : start + count]
    if not every:
        raise RequestError(f"{shown_path(path)}: has {sum(each)} frames, so none from {start} on; give another start")
    return ClipFile(np.stack([frames[i] for i in every]))


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of a file of clips or images that parvis wrote; None for any other, and one that cannot be read."""
    try:
        with _source(Path(path)) as source:
            return None if source.text is None else parse(source.text, str(path))
    except (RequestError, OSError):
        return None


def is_animation(path: Path) -> bool:
    """Whether a file has several frames; False where it cannot be read. Only the first two are looked at."""
    try:
        ready()
        # quiet before it is opened: Pillow warns of its size then
        with open_regular(path) as file, quiet(), Image.open(file, formats=["GIF", "WEBP", "PNG"]) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # readers of broken files raise nearly anything; whoever reads the picture says it
        return False


def is_clip(path: Path) -> bool:
    """Whether a file begins as one that may hold a clip; False where it cannot be read."""
    try:
        with open_regular(path) as file:
            head = file.read(12)
    except OSError:
        return False
    kinds = (b"GIF8", b"\x89PNG")
    return head.startswith(kinds) or (head[:4] == b"RIFF" and head[8:] == b"WEBP") or head[4:8] == b"ftyp"


def _of_parvis(path: Path, source: animated.Animation | mp4.Video, recipe: Recipe) -> ClipFile:
    """The frames of a file with a recipe of clips."""
    if isinstance(source, mp4.Video):
        source.keep_planes = True
    frames, seconds = [], []
    for frame, shown_for in source:
        frames.append(frame)
        seconds.append(shown_for)
        if len(frames) > recipe.frames:
            break
    each = [recipe.frames] if len(frames) == 1 else repeats(seconds, recipe.fps, str(path))
    if len(frames) == recipe.frames:  # whatever another program made of their times
        each = [1] * len(frames)
    if sum(each) != recipe.frames:
        raise RequestError(
            f"{shown_path(path)}: has {sum(each)} frames, parvis wrote {recipe.frames}: it was cut, or is truncated; "
            "give an undamaged copy"
        )
    planes = source.planes if isinstance(source, mp4.Video) else []
    every = [i for i, k in enumerate(each) for _ in range(k)]
    return _reduced(np.stack([frames[i] for i in every]), planes, recipe)


def _reduced(frames: NDArray[np.uint8], planes: list[NDArray[np.uint8]], recipe: Recipe) -> ClipFile:
    """The frames without their enlargement, and a recipe whose hashes are "" for what was changed since."""
    scale, size = recipe.scale, frames.shape[1:3]
    whole_squares = not any(side % scale for side in size)
    rows, columns = -(-len(recipe) // recipe.columns), recipe.columns
    fits = whole_squares and size[0] // scale >= rows and size[1] // scale >= columns
    changed = False
    if whole_squares and scale > 1:
        small = np.ascontiguousarray(frames[:, ::scale, ::scale])
        changed = not planes and not (small.repeat(scale, 1).repeat(scale, 2) == frames).all()
        if changed or planes:
            small = np.stack([np.asarray(Image.fromarray(frame).reduce(scale)) for frame in frames])
        frames = small
    known = recipe.pixel_hashes or [""] * len(recipe)
    same = [False] * len(recipe)
    if fits and not changed:
        have = _hashed(np.stack(planes) if planes else frames, recipe)
        same = [pixel_hash(each) == wanted for each, wanted in zip(have, known, strict=True)]
    hashes = [digest if ok else "" for digest, ok in zip(known, same, strict=True)]
    return ClipFile(frames, replace(recipe, pixel_hashes=hashes))


def _check_pixels(path: Path, frames: int, width: int, height: int) -> None:
    if frames * width * height > MOST_PIXELS:
        size = f"{frames} frame{'s' if frames > 1 else ''} of {width}x{height}"
        raise RequestError(
            f"{shown_path(path)}: {size} are too many pixels; expected at most "
            f"{MOST_PIXELS} in all: give a smaller clip"
        )


@contextmanager
def _source(path: Path) -> Iterator[animated.Animation | mp4.Video]:
    """``path``, opened as a clip; every fault of it, also while it is read, as a RequestError of one line."""
    name = shown_path(path)
    why = why_not_regular(path)
    if why is not None:
        raise RequestError(advised(f"{name}: {'no such file' if why == 'missing' else why}", EXPECTED))
    size = path.stat().st_size
    if not 0 < size <= MOST_FILE_BYTES:
        raise RequestError(f"{name}: {size} bytes; {EXPECTED}, of at most {MOST_FILE_BYTES} bytes")
    try:
        ready()
        with open_regular(path) as file, quiet():
            head = file.read(12)
            file.seek(0)
            if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
                with mp4.opened(file) as video:
                    yield video
            else:
                with Image.open(file, formats=["GIF", "WEBP", "PNG"]) as image:
                    _check_pixels(path, 1, *image.size)
                    yield animated.Animation(image)
    except RequestError as error:
        raise (error if os.fspath(path) in str(error) or name in str(error) else _named(name, error)) from error
    except mp4.ChangedSizeError as error:
        now = "x".join(map(str, error.size))
        raise RequestError(
            f"{name}: a frame of it is {now} pixels, unlike the first; {EXPECTED} of one size"
        ) from error
    except UnidentifiedImageError as error:
        raise RequestError(f"{name}: no clip that can be read; {EXPECTED}: {OTHERS}") from error
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"{name}: has too many pixels; expected at most {MOST_PIXELS} in all: give a smaller clip"
        ) from error
    except MemoryError as error:
        raise RequestError(f"{name}: not enough memory for this clip; give a smaller one") from error
    except Exception as error:  # readers of broken files raise nearly anything
        if isinstance(error, OSError) and error.errno in REMEDIES:
            raise RequestError(f"{name}: {unreadable(error)}") from error
        reason = shown(getattr(error, "strerror", None) or str(error), 120).strip("'\"") or type(error).__name__
        raise RequestError(
            f"{name}: no clip that can be read ({reason}); it may be truncated or damaged; {EXPECTED}"
        ) from error


def _named(name: str, error: RequestError) -> RequestError:
    return RequestError(f"{name}: {error}")
