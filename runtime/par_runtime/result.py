"""What a pipeline gives back: images and tokens, with everything that is needed to make them again."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.arguments import as_index, file_name, given, plain, truth
from par_runtime.backends.base import image_shape
from par_runtime.bundle import Bundle
from par_runtime.checked import shown, shown_path
from par_runtime.clips import animated, files
from par_runtime.clips.formats import DEFAULT_FPS, FORMATS, check_clips, check_fps, format_of
from par_runtime.dtypes import Int, same_value
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.recipe import MadeOn
from par_runtime.known import sequence_tokens
from par_runtime.request import Settings, array, class_indices, image_seeds, image_settings, several
from par_runtime.system import check_writable, write_beside

NOTEBOOK_PIXELS = 2**22  #: a notebook shows no larger sheet by itself


def default_columns(count: int, clips: bool = False) -> int:
    """Images per row of a sheet that is about square; of ``clips`` without an empty place, if that is not too wide."""
    least = max(1, math.ceil(math.sqrt(count)))
    if clips:  # an empty place is white, beside frames that move
        return next((each for each in range(least, 2 * least) if count % each == 0), least)
    return least


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What ``generate`` returns; the arrays belong to the caller.

    ``images`` uint8 [B,H,W,3], of a video bundle the frames [B,T,H,W,3]; None where the bundle ends at tokens.
    ``tokens`` int64 [B,N] in sequence order. ``timings``: milliseconds of each phase (summed over its calls), "decode"
    and "total"; "calls" is their number. A backend that makes whole images gives "image" in place of the phases.

    It is also a sequence: ``len(result)``, ``result[0]`` and ``result[2:]`` are results of fewer images, with the
    timings of the whole request. Two results are equal where they were asked for and came out the same; how long that
    took, and on what, does not matter. A notebook shows the images.
    """

    bundle: Bundle
    images: NDArray[np.uint8] | None
    tokens: Int
    labels: list[int]
    seeds: list[int]
    settings: list[Settings]
    timings: dict[str, float]
    kept: NDArray[np.bool_] | None = (
        None  #: [B,N] in sequence order: which tokens were given; None where all were drawn
    )
    made_on: MadeOn | None = None  #: what computed it

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> Result:
        if not isinstance(index, slice):
            i = range(len(self))[index]  # raises what a list would
            index = slice(i, i + 1)
        return replace(
            self,
            images=None if self.images is None else self.images[index],
            tokens=self.tokens[index],
            labels=self.labels[index],
            seeds=self.seeds[index],
            settings=self.settings[index],
            kept=None if self.kept is None else self.kept[index],
        )

    def __iter__(self) -> Iterator[Result]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        names = ("labels", "seeds", "settings", "tokens", "images", "kept")
        same = all(same_value(getattr(self, name), getattr(other, name)) for name in names)
        return same and self.bundle.hash == other.bundle.hash

    __hash__ = None  # type: ignore[assignment]  # its arrays may be changed

    def __repr__(self) -> str:
        one = "clip" if self.bundle.video else "image"
        several = one if len(self) == 1 else f"{one}s"
        what = "tokens only" if self.images is None else f"{self.images.shape[-2]}x{self.images.shape[-3]}"
        if self.bundle.video and self.images is not None:
            what = f"{self.images.shape[1]} frames of {what}"
        names = self.bundle.class_names
        labels = [label if names is None else names[label] for label in self.labels[:4]]
        more = len(self) > 4
        return (
            f"Result({len(self)} {several}, {what}, bundle {shown(self.bundle.name, 40)}, labels {shown(labels, 100)}"
            f"{' ...' * more}, seeds {shown(self.seeds[:4], 100)}{' ...' * more})"
        )

    def pil(self) -> list[Image.Image]:
        """The images as PIL images (RGB); of clips all frames, one clip after the other. Raises RequestError where the
        bundle ends at tokens.
        """
        pixels = self._pixels()
        return [Image.fromarray(image) for image in pixels.reshape(-1, *pixels.shape[-3:])]

    def save(
        self,
        path: str | Path,
        columns: int | None = None,
        indices: int | Sequence[int] | None = None,
        pasted: bool = False,
        scale: int = 1,
        fps: float | None = None,
    ) -> None:
        """Write the images ``indices`` (one, several, by default all) as one PNG, with what makes them again.

        Clips become a GIF, WebP, animated PNG (.apng or .png) or MP4, by the name, of ``fps`` frames per second
        (default: 8).

        ``parvis redo`` makes them from it, ``parvis edit`` changes them. ``columns``: images per row (default: about
        a square). ``pasted``: the kept pixels are those of an original. ``scale``: each pixel becomes a square of so
        many a side, to look at small images; ``redo`` and ``edit`` undo it. The folder is made where it is missing, and
        the file appears whole or not at all. Raises RequestError, OSError.
        """
        path = file_name("path", path)
        data = self._content(path, columns, indices, pasted, scale, fps, write=True)
        write_beside(path, lambda part: part.write_bytes(data))

    def to_bytes(
        self,
        kind: str | None = None,
        columns: int | None = None,
        indices: int | Sequence[int] | None = None,
        scale: int = 1,
        fps: float | None = None,
    ) -> bytes:
        """The bytes of the file that :meth:`save` writes, for instance for the answer of a server.

        ``kind``: ".png"; of clips ".gif" (default), ".webp", ".apng" (or ".png") or ".mp4". The others are those of
        :meth:`save`.
        Raises RequestError.
        """
        kind = (".gif" if self.bundle.video else ".png") if kind is None else kind
        kinds = tuple(FORMATS) if self.bundle.video else (".png",)
        if not isinstance(kind, str) or kind.lower() not in kinds:
            raise RequestError(f"kind {given(kind)}: expected {' or '.join(kinds)}, the ending of a file's name")
        return self._content(Path(f"x{kind}"), columns, indices, False, scale, fps, write=False)

    def _content(
        self,
        path: Path,
        columns: int | None,
        indices: int | Sequence[int] | None,
        pasted: bool,
        scale: int,
        fps: float | None,
        write: bool,
    ) -> bytes:
        """What :meth:`save` writes to ``path``; ``write``: it is checked that this can be done, before any work."""
        own = self._checked()
        clips, images = own.bundle.video, own._pixels()
        is_folder = write and path.is_dir()  # the check says so
        if fps is not None and not clips:
            raise RequestError(f"fps {given(fps)}: these are images, not clips; leave it out")
        if clips and not is_folder:
            format_of(path)
        elif path.suffix.lower() != ".png" and not is_folder:
            raise RequestError(
                f"{shown_path(path)}: expected a name that ends in .png (what makes an image again is kept in its "
                "metadata); for other kinds of file, save one of pil()"
            )
        pick = own._pick(indices)
        columns = default_columns(len(pick), clips) if columns is None else columns
        png.check_scale(scale)
        pasted, scale = truth("pasted", pasted), operator.index(scale)
        if pasted and (own.kept is None or not own.kept[pick].any()):
            raise RequestError("pasted True: expected False, as no token of these images was given")
        if clips:
            fps = check_fps(DEFAULT_FPS if fps is None else fps, path)
            check_clips(path, len(pick), columns, images.shape[1], images.shape[2:4], scale)
        else:
            png.check_sheet(len(pick), columns, (images.shape[1] * scale, images.shape[2] * scale))
        if write:
            check_writable(path)
        names = own.bundle.class_names
        recipe = png.Recipe(
            bundle_name=own.bundle.name,
            bundle_hash=own.bundle.hash,
            columns=operator.index(columns),
            labels=[own.labels[i] for i in pick],
            names=[None if names is None else names[own.labels[i]] for i in pick],
            seeds=[own.seeds[i] for i in pick],
            settings=[own.settings[i] for i in pick],
            tokens=own.tokens[pick],
            kept=None if own.kept is None else own.kept[pick],
            pasted=pasted,
            scale=scale,
            fps=fps,
            made_on=own.made_on,
        )
        return files.content(path, recipe, images[pick]) if clips else png.content(recipe, images[pick])

    def _pixels(self) -> NDArray[np.uint8]:
        """The images. Raises RequestError where there are none."""
        if self.images is None:
            why = (
                "this bundle ends at tokens and makes no images"
                if self.bundle.image_size is None
                else "these are tokens only (decode=False); pipeline.decode(result.tokens) makes their images"
            )
            raise RequestError(f"{self.bundle.path}: {why}; write tokens with --tokens, or np.save(x, result.tokens)")
        images, shape = array("images", self.images), image_shape(self.bundle)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            floats = (  # a cast makes values of 0..1 black, and wraps those beyond 255
                ": for values of 0..255 give np.rint(x).clip(0, 255).astype(np.uint8), for those of 0..1 "
                "np.rint(255 * x).clip(0, 255).astype(np.uint8)"
            )
            raise RequestError(
                f"images have shape {images.shape} and type {images.dtype}; expected uint8 "
                f"[B,{','.join(map(str, shape))}], the size of the bundle{floats if images.dtype != np.uint8 else ''}"
            )
        return images

    def _checked(self) -> Result:
        """This result, with each field as ``generate`` gives it: somebody may have replaced some.

        Numbers of numpy are those of Python, since files hold no others. Raises RequestError.
        """
        images, labels = self._pixels(), class_indices(self.bundle, self.labels)
        for name in ("seeds", "settings"):  # None would be another request: for random seeds, for the defaults
            if getattr(self, name) is None:
                raise RequestError(f"{name} None: expected a list of one per image, as generate() gives it")
        count, n = len(labels), self.bundle.n_tokens
        tokens = sequence_tokens(self.bundle, self.tokens)
        for name, have in (("images", len(images)), ("tokens", len(tokens))):
            if have != count:
                raise RequestError(f"{have} {name} for {count} labels; give one of each for every image")
        kept = None if self.kept is None else array("kept", self.kept)
        if kept is not None and (kept.dtype != np.bool_ or kept.shape != (count, n)):
            raise RequestError(
                f"kept has shape {kept.shape} and type {kept.dtype}; expected bool [{count},{n}] in sequence order, or "
                "None where no token was given"
            )
        if not isinstance(self.made_on, MadeOn | None):
            raise RequestError(f"made_on {given(self.made_on)}: expected what generate() gives, or None")
        seeds = image_seeds(count, None, self.seeds)
        settings = image_settings(self.bundle, count, self.settings)
        return replace(self, images=images, labels=labels, seeds=seeds, settings=settings, tokens=tokens, kept=kept)

    def _pick(self, indices: int | Sequence[int] | None) -> list[int]:
        """The images that ``indices`` names. Raises RequestError."""
        entries = several("indices", range(len(self)) if indices is None else indices)
        places = [as_index(i) for i in ([plain(indices)] if entries is None else entries)]
        try:
            pick = [range(len(self))[i] for i in places]  # type: ignore[index]
        except (IndexError, TypeError):
            pick = []
        if not len(self):
            raise RequestError("this result holds no images, so there is nothing to save")
        if not pick:
            raise RequestError(
                f"indices {given(indices)}: expected one or more whole numbers, each of the {len(self)} images "
                f"(0..{len(self) - 1})"
            )
        return pick

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: a sheet; nothing where there are no images, or too many."""
        if self.images is None:
            return None
        images = self._pixels()
        if not 0 < images[..., 0].size <= NOTEBOOK_PIXELS:
            return None
        columns = default_columns(len(images), self.bundle.video)
        if self.bundle.video:  # browsers play an animated PNG
            return animated.as_apng(files.sheets(images, columns), 1, DEFAULT_FPS, "")
        return png.encoded(png.sheet(images, columns))
