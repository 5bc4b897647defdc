"""``parvis reconstruct`` and ``parvis edit``: images that somebody brings, through the same tokenizer and model."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.bundle import Bundle
from par_runtime.cli.common import MOST_IMAGES, Bar, add_common, add_sampling, guarded, save_tokens, unchecked
from par_runtime.cli.dispatch import Parser
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.photo import REGION, box_of, fitted, kept_tokens, open_image, placed, region
from par_runtime.metrics import finite, psnr_db
from par_runtime.pipeline import Pipeline, Result
from par_runtime.request import class_index
from par_runtime.system import check_writable, write_beside
from par_runtime.tokenizer import Tokenizer


def reconstruct(argv: Sequence[str]) -> int:
    """Encode images to tokens and decode them: what the tokenizer keeps of them."""
    args = _reconstruct_parser().parse_args(argv)
    return guarded(lambda: _reconstruct(args))


def edit(argv: Sequence[str]) -> int:
    """Make a part of an image anew: inpainting, outpainting, another class for the rest."""
    args = _edit_parser().parse_args(argv)
    return guarded(lambda: _edit(args))


def _reconstruct(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    tokenizer = Tokenizer(bundle, args.threads)
    assert bundle.image_size is not None
    size = bundle.image_size
    out = args.out or Path(f"{args.image[0].stem}-reconstruction.png")
    _check_outputs(out, args.tokens)
    given = np.stack([fitted(open_image(path), size, args.fit) for path in args.image])
    clock = time.perf_counter()
    tokens = tokenizer.encode(given)
    encoded = time.perf_counter()
    images = tokenizer.decode(tokens)
    decoded = time.perf_counter()
    shown = np.concatenate([given, images], axis=2) if args.beside else images
    sheet = png.sheet(shown, math.ceil(math.sqrt(len(shown))))
    write_beside(out, lambda part: Image.fromarray(sheet).save(part, format="PNG"))
    if args.tokens is not None:
        write_beside(args.tokens, lambda part: save_tokens(part, tokens))
    rows = [
        {"image": str(path), "psnr_db": psnr_db(was, now), "codes": len(np.unique(row))}
        for path, was, now, row in zip(args.image, given, images, tokens, strict=True)
    ]
    if args.json:
        ms = {"encode": 1e3 * (encoded - clock), "decode": 1e3 * (decoded - encoded)}
        print(json.dumps({"written": str(out), "images": finite(rows), "timings_ms": ms}))
    elif not args.quiet:
        for row in rows:
            print(
                f"{row['image']}: {size[1]}x{size[0]} pixels in {bundle.n_tokens} tokens, {row['codes']} different codes, "
                f"PSNR {row['psnr_db']:.1f} dB"
            )
        print(f"{out}: encoded in {encoded - clock:.2f} s, decoded in {decoded - encoded:.2f} s")
    return 0


@dataclass(frozen=True)
class _Original:
    """What is edited: pixels [H,W,3], which of them stay [H,W], its tokens [N] if they are known, its class if it is."""

    pixels: NDArray[np.uint8]
    stays: NDArray[np.bool_]
    tokens: Int | None
    label: int | None


def _edit(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if not 1 <= args.count <= MOST_IMAGES:
        raise RequestError(f"--count {args.count}: expected 1 or more, at most {MOST_IMAGES} in one command")
    bundle = Bundle.open(args.bundle)
    if bundle.image_size is None:
        raise RequestError(f"{bundle.path}: this bundle ends at tokens and makes no images; export it with a tokenizer")
    original = _original(args, bundle)
    keep = kept_tokens(original.stays, bundle.grid[1:])
    kept = int(keep.sum())
    if kept in (0, keep.size):
        cell = bundle.image_size[0] // bundle.grid[1]
        raise RequestError(
            f"{'no token stays' if kept == 0 else f'all {kept} tokens stay'}, so there is nothing to edit; a token is "
            f"{cell}x{cell} pixels, and stays where all of them do: give another region"
        )
    label = original.label if args.label is None else class_index(bundle, args.label)
    if label is None:
        raise RequestError(f"{args.image} does not say its class; give one with --label")
    first = args.seed if args.seed is not None else int(np.random.default_rng().integers(2**32))
    out = args.out or Path(f"{args.image.stem}-edit-{first}.png")
    _check_outputs(out, args.tokens)
    tokens = original.tokens
    if tokens is None:  # before the model is loaded, which may take longer
        tokens = Tokenizer(bundle, args.threads).encode(original.pixels)[0]
    pipeline = Pipeline.load(
        args.bundle,
        args.device,
        threads=args.threads,
        selftest=not args.no_selftest,
        verify=unchecked(bundle),
        capture=args.capture,
    )
    with Bar(args.quiet or args.json) as bar:
        result = pipeline.generate(
            [label] * args.count,
            guidance=args.guidance,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seeds=[first + i for i in range(args.count)],
            greedy=args.greedy,
            on_step=bar,
            keep=keep,
            tokens=tokens,
        )
    if args.paste:
        result = _pasted(result, original)
    columns = math.ceil(math.sqrt(args.count))
    png.write(out, bundle, result, columns, pasted=args.paste)
    if args.tokens is not None:
        write_beside(args.tokens, lambda part: save_tokens(part, result.tokens))
    seconds = time.perf_counter() - started
    if args.json:
        row = {
            "written": str(out),
            "bundle": {"name": bundle.name, "hash": bundle.hash},
            "backend": pipeline.backend.info.name,
            "label": label,
            "seeds": result.seeds,
            "kept_tokens": kept,
            "tokens": keep.size,
            "encoded": original.tokens is None,
            "timings_ms": result.timings,
        }
        print(json.dumps(row))
    elif not args.quiet:
        name = str(label) if bundle.class_names is None else bundle.class_names[label]
        print(
            f"{out}: {args.count} image{'s' if args.count > 1 else ''} of {name}, seed {first}{' and on' if args.count > 1 else ''}, "
            f"{kept} of {keep.size} tokens kept{'' if original.tokens is None else ' as they were generated'}, in {seconds:.1f} s"
        )
    return 0


def _original(args: argparse.Namespace, bundle: Bundle) -> _Original:
    """The image of the command line, its region, and what its own metadata says of it. Raises RequestError, OSError."""
    assert bundle.image_size is not None
    size = bundle.image_size
    if args.place is not None:
        box = box_of(args.place, size)
        pixels, stays = placed(open_image(args.image), size, box)
        return _Original(pixels, stays, None, None)
    recipe, sheet = png.find(args.image)
    named = region(args.change if args.keep is None else args.keep, size, args.fit)
    stays = ~named if args.keep is None else named
    if recipe is None:
        if args.which is not None:
            raise RequestError(f"--which {args.which}: {args.image} is one image, not a sheet of 'parvis generate'")
        return _Original(fitted(open_image(args.image), size, args.fit), stays, None, None)
    count = len(recipe.labels)
    which = 0 if args.which is None and count == 1 else args.which
    if which is None or not 0 <= which < count:
        raise RequestError(f"{args.image} holds {count} images; choose one with --which 0 .. {count - 1}")
    row, column = divmod(which, recipe.columns)
    height, width = sheet.shape[0] // -(-count // recipe.columns), sheet.shape[1] // recipe.columns
    cell = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
    if recipe.bundle_hash == bundle.hash and recipe.tokens.shape[1] == bundle.n_tokens:
        return _Original(cell, stays, recipe.tokens[which], recipe.labels[which])
    # Another bundle's tokens mean nothing here; its pixels do.
    if not (args.quiet or args.json):
        print(f"parvis: {args.image} was made by bundle {recipe.bundle_name!r}; encoding its pixels", file=sys.stderr)
    return _Original(fitted(Image.fromarray(cell), size, args.fit), stays, None, None)


def _pasted(result: Result, original: _Original) -> Result:
    """The original's pixels where they stay: decoding changes them a little, and a user's photo should not change."""
    assert result.images is not None
    return replace(result, images=np.where(original.stays[..., None], original.pixels, result.images))


def _check_outputs(out: Path, tokens: Path | None) -> None:
    if out.suffix.lower() != ".png":
        raise RequestError(f"--out {out}: expected a name that ends in .png")
    if tokens is not None and tokens.suffix != ".npy":
        raise RequestError(f"--tokens {tokens}: expected a name that ends in .npy")
    for path in (out, tokens):
        if path is not None:
            check_writable(path)


def _reconstruct_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis reconstruct",
        description="Encode images to tokens and decode them again: what the tokenizer of a bundle keeps of an image. "
        "Nothing is generated.",
    )
    p.add_argument("image", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, WebP, ...")
    p.add_argument("--bundle", type=Path, required=True, help="a bundle with an encoder")
    p.add_argument("--out", type=Path, help="PNG to write (default: named after the first image)")
    p.add_argument("--beside", action="store_true", help="show each original left of its reconstruction")
    p.add_argument("--tokens", type=Path, help=".npy to write: tokens [B,N] int64 in sequence order")
    _add_fit(p)
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="print nothing")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


def _edit_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis edit",
        description="Make a part of an image anew and keep the rest: inpainting (--change), outpainting (--place), another "
        "class for a part (--keep with --label). A PNG of 'parvis generate' is edited from the tokens it holds; any other "
        "image is encoded first. A token is drawn knowing only what comes before it in the model's order.",
        epilog=f"REGION: {REGION.removeprefix('expected ')}. Pixels are those of the model's images, after fitting.",
    )
    p.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, ..., or a sheet of 'parvis generate'")
    p.add_argument("--bundle", type=Path, required=True, help="the bundle that makes the new part")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--keep", metavar="REGION", help="what stays; the rest is made anew")
    where.add_argument("--change", metavar="REGION", help="what is made anew; the rest stays")
    where.add_argument(
        "--place", metavar="X0,Y0,X1,Y1", help="shrink the image into this box and make what is around it"
    )
    p.add_argument("--label", help="class of the result (default: the image's own, if 'parvis generate' made it)")
    p.add_argument("--which", type=int, metavar="I", help="the image of a sheet to edit, from 0, row by row")
    p.add_argument("--count", type=int, default=1, help="variants to make (default: 1)")
    p.add_argument("--seed", type=int, help="of the first variant (default: a new one each time)")
    p.add_argument("--out", type=Path, help="PNG to write (default: named after the image and the seed)")
    p.add_argument("--tokens", type=Path, help=".npy to write: tokens [B,N] int64 in sequence order")
    p.add_argument(
        "--paste", action="store_true", help="put the original's own pixels back where they stay, over the decoded ones"
    )
    _add_fit(p)
    p.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    add_sampling(p)
    add_common(p)
    p.add_argument("--no-selftest", action="store_true", help="do not check the bundle's test tokens first")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


def _add_fit(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fit",
        choices=["crop", "stretch"],
        default="crop",
        help="how an image of another shape becomes one of the model's: its largest middle part (default), or stretched",
    )
