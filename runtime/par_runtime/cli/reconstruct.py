"""``parvis reconstruct``: images or clips through the tokenizer of a bundle and back; nothing is generated."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded, printable
from par_runtime.cli.inputs import quiet_readers
from par_runtime.cli.outputs import (
    check_fps,
    check_outputs,
    say_of_animations,
    suffix_of,
    write_all,
    write_tokens,
)
from par_runtime.clips import files
from par_runtime.clips.formats import DEFAULT_FPS, check_clips
from par_runtime.images import png
from par_runtime.images.photo import fit_image
from par_runtime.metrics import finite, psnr_db
from par_runtime.result import default_columns
from par_runtime.tokenizer import Tokenizer, fitted_clip, read_clips


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "fewer pictures")


def run(args: argparse.Namespace) -> int:
    """Encode the images or clips, decode them again, write the sheet and report the PSNR of each."""
    bundle = Bundle.open(args.bundle)
    tokenizer = Tokenizer(bundle, args.threads, args.decoder_precision)
    out = args.out or Path(f"{args.image[0].stem}-reconstruction{suffix_of(bundle)}")
    check_outputs(bundle, out, args.tokens, args.image, recipe=False)
    check_fps(bundle, args.fps, [out])
    png.check_scale(args.scale)
    if not (bundle.video or args.quiet or args.json):
        say_of_animations(args.image)
    with quiet_readers():
        names, originals = (_clips if bundle.video else _images)(args, bundle, out)
    started = time.perf_counter()
    tokens = tokenizer.encode(originals)
    encoded = time.perf_counter()
    images = tokenizer.decode(tokens)
    decoded = time.perf_counter()
    shown = np.concatenate([originals, images], axis=-2) if args.beside else images
    wanted: list[tuple[Path, Callable[[], object]]] = [(out, partial(_write, args, out, shown))]
    if args.tokens is not None:
        wanted.append((args.tokens, partial(write_tokens, args.tokens, tokens)))
    write_all(wanted)
    rows = [
        {"image": name, "psnr_db": psnr_db(before, after), "codes": len(np.unique(row))}
        for name, before, after, row in zip(names, originals, images, tokens, strict=True)
    ]
    if args.json:
        ms = {"encode": 1e3 * (encoded - started), "decode": 1e3 * (decoded - encoded)}
        print(json.dumps({"written": str(out), "images": finite(rows), "timings_ms": ms}))
    elif not args.quiet:
        height, width = originals.shape[-3:-1]
        pixels = f"{bundle.frames} frames of {width}x{height}" if bundle.video else f"{width}x{height}"
        for row in rows:
            print(
                f"{printable(str(row['image']))}: {pixels} pixels in {bundle.n_tokens} tokens, "
                f"{row['codes']} different codes, PSNR {row['psnr_db']:.1f} dB"
            )
        print(f"{printable(str(out))}: encoded in {encoded - started:.2f} s, decoded in {decoded - encoded:.2f} s")
    return 0


def _size(args: argparse.Namespace, bundle: Bundle) -> tuple[int, int]:
    """(H, W) of what is shown of each image or clip, without ``--scale``."""
    assert bundle.image_size is not None
    return bundle.image_size[0], bundle.image_size[1] * (2 if args.beside else 1)


def _images(args: argparse.Namespace, bundle: Bundle, _: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """The names of the images and their pixels [B,H,W,3]; of a sheet of parvis all its images. Raises RequestError,
    OSError.
    """
    assert bundle.image_size is not None
    names, images = list[str](), list[NDArray[np.uint8]]()
    for path in args.image:
        recipe, image = png.read_any(path)
        count = 1 if recipe is None else len(recipe)
        if recipe is not None and image.size[::-1] == png.sheet_size(count, recipe.columns, bundle.image_size):
            each = [png.sheet_image(np.asarray(image), recipe.columns, count, i) for i in range(count)]
        else:
            each = [fit_image(image, bundle.image_size, args.fit)]
        names += _names(path, len(each))
        images += each
    height, width = _size(args, bundle)
    png.check_sheet(len(images), default_columns(len(images)), (height * args.scale, width * args.scale))
    return names, np.stack(images)


def _names(path: Path, count: int) -> list[str]:
    """What the images or clips of one file are called."""
    return [f"{path} ({i})" for i in range(count)] if count > 1 else [str(path)]


def _clips(args: argparse.Namespace, bundle: Bundle, out: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """The names of the clips and their frames [B,T,H,W,3]; of a sheet of parvis all its clips. Raises RequestError,
    OSError.
    """
    assert bundle.image_size is not None
    names, clips = list[str](), list[NDArray[np.uint8]]()
    for path in args.image:
        each = read_clips(bundle, path)
        names += _names(path, len(each))
        clips += [fitted_clip(bundle, frames, args.fit, str(path)) for frames in each]
    check_clips(out, len(clips), default_columns(len(clips), True), bundle.frames, _size(args, bundle), args.scale)
    return names, np.stack(clips)


def _write(args: argparse.Namespace, out: Path, shown: NDArray[np.uint8]) -> None:
    """Write images [B,H,W,3] or clips [B,T,H,W,3] as one sheet."""
    columns = default_columns(len(shown), shown.ndim == 5)
    if shown.ndim == 4:
        png.write_pixels(out, png.enlarged(png.sheet(shown, columns), args.scale))
    else:
        fps = DEFAULT_FPS if args.fps is None else args.fps
        files.write_frames(out, files.sheets(shown, columns), fps, args.scale)


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis reconstruct``."""
    p = Parser(
        prog="parvis reconstruct",
        description="Encode images to tokens and decode them again: what the tokenizer of a bundle keeps of an image, "
        "or of the first frames of a clip. Nothing is generated.",
    )
    p.add_argument(
        "image",
        type=options.path,
        nargs="+",
        metavar="IMAGE",
        help="PNG, JPEG, WebP, ...; of a video bundle GIF, WebP, animated PNG or MP4",
    )
    options.add_bundle_option(p, "a bundle with an encoder")
    options.add_out(p, "PNG to write, or the file of a clip (default: named after the first image)")
    p.add_argument("--beside", action="store_true", help="show each original left of its reconstruction")
    options.add_scale(p)
    options.add_fps(p)
    options.add_tokens(p)
    options.add_fit(p)
    options.add_threads(p)
    options.add_decoder_precision(p)
    options.add_quiet(p, "print nothing")
    options.add_json(p)
    return p
