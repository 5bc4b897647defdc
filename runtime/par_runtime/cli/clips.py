"""``parvis edit`` and ``parvis redo`` of a video bundle: the next frames of a clip, another part of it, or it again."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.bundle import Bundle
from par_runtime.cli.common import printable
from par_runtime.cli.inputs import (
    PIXEL_TOLERANCE,
    check_recipe,
    load_pipeline,
    made_again,
    other_decoder,
    quiet_readers,
    read_by_edit,
    then_and_now,
    variants,
)
from par_runtime.cli.outputs import (
    check_outputs,
    check_sheet,
    check_tokens_name,
    report_edited,
    suffix_of,
    write_all,
    write_tokens,
)
from par_runtime.clips import files
from par_runtime.clips.formats import FORMATS, format_of
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images.opening import open_image
from par_runtime.images.photo import fit_image
from par_runtime.images.recipe import Recipe, check
from par_runtime.metrics import psnr_db
from par_runtime.request import class_index, first_seed
from par_runtime.result import Result, default_columns

NO_CLIP = "it is no clip of parvis"


def redo(args: argparse.Namespace, bundle: Bundle) -> int:
    """Make the clips of a file again from its recipe, write them if asked, and print how they compare.

    Exit code 0 where tokens are identical and no clip was changed, else 1. Raises RequestError, OSError.
    """
    with quiet_readers():
        file = files.read_any(args.image, bundle.frames)
    recipe = file.recipe
    if recipe is None:
        if files.recipe_of(args.image) is not None:
            raise RequestError(
                f"{args.image}: holds images, and {bundle.path} makes clips; give the --bundle that made them"
            )
        raise RequestError(
            f"{args.image}: has no 'parvis' entry; only a file of 'parvis generate' or 'edit' can be made "
            "again, and only while no other program has saved it"
        )
    check_recipe(args, bundle, recipe)
    assert bundle.image_size is not None
    before = file.clips(bundle.image_size)
    if before is None or before.shape[1] != bundle.frames:
        raise RequestError(f"{args.image}: was cut or resized since parvis wrote it; give an undamaged copy")
    if recipe.given == recipe.tokens.size:
        raise RequestError(f"{args.image}: there is nothing to make again: all its tokens were given, none was drawn")
    if args.out is not None:
        check_outputs(bundle, args.out, None, [args.image])
    pipeline, result = made_again(args, bundle, recipe)
    if args.out is not None:
        result.save(args.out, recipe.columns, scale=recipe.scale, fps=recipe.fps)
    assert result.images is not None
    differing = np.argwhere(result.tokens != recipe.tokens)
    changed = sum(not digest for digest in recipe.pixel_hashes or [])
    count = f"{len(recipe)} clip{'s' if len(recipe) > 1 else ''} of {bundle.frames} frames"
    if len(differing):
        clip, position = differing[0]
        text = (
            f"different: clip {clip} (label {recipe.labels[clip]}, seed {recipe.seeds[clip]}) first differs at token "
            f"{position}; {len(differing)} of all {result.tokens.size} tokens differ "
            f"({then_and_now(recipe, pipeline.backend.info)})"
        )
        same = False
    elif changed:
        text = f"different: the tokens are the same, but {changed} of {count} were changed since parvis wrote them"
        same = False
    else:
        known = FORMATS.get(args.image.suffix.lower())
        same, pixels = _compare_pixels(known is not None and known.lossless, recipe, before, result)
        text = f"identical: {count}, {result.tokens.size - recipe.given} tokens drawn, {pixels}"
        if not same:
            text = f"different: the tokens are the same, the pixels are not ({pixels})"
    print(printable(f"{args.image}: {text}"))
    return int(not same)


def _compare_pixels(lossless: bool, recipe: Recipe, before: NDArray[np.uint8], result: Result) -> tuple[bool, str]:
    """Whether the frames ``before`` of a file are those of ``result``, which has its tokens, but for rounding; and how
    they compare. ``lossless``: the file keeps pixels as they are.
    """
    assert result.images is not None
    most = int(np.abs(result.images.astype(int) - before).max())
    if not most:
        return True, "every pixel"
    decoders = other_decoder(recipe, result)
    near = f"{psnr_db(result.images, before):.1f} dB{'; ' if decoders else ''}{decoders}"
    if lossless:
        return most <= PIXEL_TOLERANCE, f"pixels differ by up to {most} of 255, {near}"
    return True, f"pixels as the file keeps them ({near})"


def edit(args: argparse.Namespace, bundle: Bundle) -> int:
    """Keep frames, or a region of all frames, of a clip, and make the rest anew. Raises RequestError, OSError."""
    started = time.perf_counter()
    if args.place is not None or args.paste:
        raise RequestError("--place and --paste are for images; of a clip give --keep-frames, or a region")
    if args.keep_frames is None and args.keep is None and args.change is None:
        raise RequestError("nothing says what stays; give --keep-frames K, --keep REGION or --change REGION")
    check_tokens_name(args.tokens)  # before a file is read
    original = _original(args, bundle)
    label = original.label if args.label is None else class_index(bundle, args.label)
    if label is None:
        raise RequestError(f"{args.image}: its class is not known ({original.why}); give one with --label")
    first = first_seed(args.seed)
    out = args.out or Path(f"{args.image.stem}-edit-{first}{suffix_of(bundle)}")
    check_outputs(bundle, out, args.tokens, read_by_edit(args))
    check_sheet(bundle, out, args.count, default_columns(args.count, True), args.scale)
    fps = args.fps
    if fps is None and original.fps is not None:  # as fast as what it continues, where the kind of file can
        fps = min(original.fps, format_of(out).most_fps)
    pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
    keep = pipeline.keep_mask(
        change=args.change, keep=args.keep, fit=args.fit, mask_from=args.mask_from, keep_frames=args.keep_frames
    )
    kept = int(keep.sum())
    if kept in (0, keep.size):
        raise RequestError(
            f"{'no token stays' if kept == 0 else f'all {kept} tokens stay'}, so there is nothing to edit; the first "
            f"frame is a latent frame of its own, and each of the others is {bundle.time_downsampling} frames: give "
            "other frames, or another region"
        )
    if not (args.quiet or args.json):
        _say_what_was_taken(args, bundle, original, keep)
    tokens = original.tokens
    if tokens is None:
        tokens = pipeline.encode(_filled(args, bundle, original.frames, keep))[0]
    result = variants(args, pipeline, label, first, keep, tokens)
    wanted: list[tuple[Path, Callable[[], object]]] = [(out, partial(result.save, out, scale=args.scale, fps=fps))]
    if args.tokens is not None:
        wanted.append((args.tokens, partial(write_tokens, args.tokens, result.tokens)))
    written = write_all(wanted)
    why = original.why if original.tokens is None else None
    report_edited(args, pipeline, result, keep, why, started, written, frames=bundle.frames)
    return 0


def _say_what_was_taken(args: argparse.Namespace, bundle: Bundle, original: _Original, keep: NDArray[np.bool_]) -> None:
    """Print what the user may not expect: a clip of parvis is encoded, or fewer frames stay than were asked for."""
    if original.tokens is None and original.why != NO_CLIP:
        print(printable(f"parvis: {original.why}; encoding its pixels"), file=sys.stderr)
    stay = bundle.frames_of(int(keep.all((1, 2)).cumprod().sum()))
    if args.keep_frames is not None and stay < args.keep_frames and args.keep is None and args.change is None:
        some = "1 frame stays" if stay == 1 else f"{stay} frames stay"
        print(
            f"parvis: --keep-frames {args.keep_frames}: {some}; behind the first one they stay "
            f"{bundle.time_downsampling} at a time, so the next number is {stay + bundle.time_downsampling}",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class _Original:
    """The clip to edit: its ``frames`` [T,H,W,3]; its tokens [N] where parvis made it so, else ``why`` they are made of
    its pixels; its class and its frames per second, if known.
    """

    frames: NDArray[np.uint8]
    tokens: Int | None = None
    label: int | None = None
    fps: float | None = None
    why: str = NO_CLIP


def _original(args: argparse.Namespace, bundle: Bundle) -> _Original:
    """The clip, or picture, that the command line names. Raises RequestError, OSError."""
    assert bundle.image_size is not None

    def fitted(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return fit_image(Image.fromarray(frame), bundle.image_size or (0, 0), args.fit)

    with quiet_readers():
        if args.image.is_file() and not files.is_clip(args.image):  # JPEG, TIFF, ...
            return _Original(fitted(np.asarray(open_image(args.image)))[None])
        file = files.read_any(args.image, bundle.frames, fit=fitted)
    recipe = file.recipe
    if recipe is None:
        if args.which is not None:
            raise RequestError(f"--which {args.which}: {args.image} is one clip, not a sheet of 'parvis generate'")
        return _Original(file.frames)
    which = 0 if args.which is None and len(recipe) == 1 else args.which
    if which is None or not 0 <= which < len(recipe):
        raise RequestError(f"{args.image} holds {len(recipe)} clips; choose one with --which 0 .. {len(recipe) - 1}")
    own, clips = recipe.bundle_hash == bundle.hash, file.clips(bundle.image_size)
    if own:
        check(recipe, bundle, str(args.image))
    if clips is None:
        raise RequestError(f"{args.image}: was resized, or another bundle's clips have another size; give a clip alone")
    label = recipe.class_of(which, bundle)
    if not own:
        return _Original(clips[which], None, label, recipe.fps, f"{args.image} was made by another bundle")
    if recipe.pixel_hashes and recipe.pixel_hashes[which]:
        return _Original(clips[which], recipe.tokens[which], label, recipe.fps)
    why = f"the pixels of {args.image} were changed since parvis wrote it"
    return _Original(clips[which], None, label, recipe.fps, why)


def _filled(
    args: argparse.Namespace, bundle: Bundle, frames: NDArray[np.uint8], keep: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """``frames`` with the last one repeated up to a whole clip: the tokenizer sees no later frames than those kept.

    Raises RequestError where a token that stays would be of frames that are not there.
    """
    needed = bundle.frames_of(int(np.flatnonzero(keep.any((1, 2))).max()) + 1)
    if len(frames) < needed:
        raise RequestError(
            f"{args.image}: has {len(frames)} frames, and tokens of the first {needed} would stay; keep fewer"
        )
    missing = max(0, bundle.frames - len(frames))
    return np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
