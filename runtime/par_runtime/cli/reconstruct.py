"""``parvis reconstruct``: images through the tokenizer of a bundle and back; nothing is generated."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded, printable
from par_runtime.cli.inputs import quiet_readers
from par_runtime.cli.outputs import check_outputs, write_all, write_tokens
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.opening import open_image
from par_runtime.images.photo import fit_image
from par_runtime.metrics import finite, psnr_db
from par_runtime.result import default_columns
from par_runtime.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Encode the images, decode them again, write the sheet and report the PSNR of each."""
    bundle = Bundle.open(args.bundle)
    if bundle.video:
        raise RequestError(
            f"{bundle.path}: makes clips, and this verb takes images; in Python, "
            "pipeline.decode(pipeline.encode(clip)) does it for clips"
        )
    tokenizer = Tokenizer(bundle, args.threads)
    assert bundle.image_size is not None
    size = bundle.image_size
    out = args.out or Path(f"{args.image[0].stem}-reconstruction.png")
    check_outputs(out, args.tokens, args.image)
    columns = default_columns(len(args.image))
    png.check_scale(args.scale)
    width = size[1] * (2 if args.beside else 1)
    png.check_sheet(len(args.image), columns, (size[0] * args.scale, width * args.scale))
    with quiet_readers():
        originals = np.stack([fit_image(open_image(path), size, args.fit) for path in args.image])
    started = time.perf_counter()
    tokens = tokenizer.encode(originals)
    encoded = time.perf_counter()
    images = tokenizer.decode(tokens)
    decoded = time.perf_counter()
    shown = np.concatenate([originals, images], axis=2) if args.beside else images
    sheet = png.enlarged(png.sheet(shown, columns), args.scale)
    files: list[tuple[Path, Callable[[], object]]] = [(out, partial(png.write_pixels, out, sheet))]
    if args.tokens is not None:
        files.append((args.tokens, partial(write_tokens, args.tokens, tokens)))
    write_all(files)
    rows = [
        {"image": str(path), "psnr_db": psnr_db(before, after), "codes": len(np.unique(row))}
        for path, before, after, row in zip(args.image, originals, images, tokens, strict=True)
    ]
    if args.json:
        ms = {"encode": 1e3 * (encoded - started), "decode": 1e3 * (decoded - encoded)}
        print(json.dumps({"written": str(out), "images": finite(rows), "timings_ms": ms}))
    elif not args.quiet:
        for row in rows:
            print(
                f"{printable(str(row['image']))}: {size[1]}x{size[0]} pixels in {bundle.n_tokens} tokens, "
                f"{row['codes']} different codes, PSNR {row['psnr_db']:.1f} dB"
            )
        print(f"{printable(str(out))}: encoded in {encoded - started:.2f} s, decoded in {decoded - encoded:.2f} s")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis reconstruct``."""
    p = Parser(
        prog="parvis reconstruct",
        description="Encode images to tokens and decode them again: what the tokenizer of a bundle keeps of an image. "
        "Nothing is generated.",
    )
    p.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, WebP, ...")
    options.add_bundle_option(p, "a bundle with an encoder")
    options.add_out(p, "PNG to write (default: named after the first image)")
    p.add_argument("--beside", action="store_true", help="show each original left of its reconstruction")
    options.add_scale(p)
    options.add_tokens(p)
    options.add_fit(p)
    options.add_threads(p)
    options.add_quiet(p, "print nothing")
    options.add_json(p)
    return p
