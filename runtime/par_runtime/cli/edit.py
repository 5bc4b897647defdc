"""``parvis edit``: generate a part of an image again and keep the other part (inpainting, outpainting)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Bar, Parser, guarded
from par_runtime.cli.inputs import MOST_IMAGES, load_pipeline
from par_runtime.cli.outputs import check_outputs, write_tokens
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.photo import (
    REGION,
    fit_image,
    kept_tokens,
    open_image,
    parse_box,
    place_image,
    region_mask,
)
from par_runtime.pipeline import Pipeline
from par_runtime.request import class_index, first_seed
from par_runtime.result import Result
from par_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Original:
    """The image to edit: its pixels [H,W,3], which of them stay [H,W], its tokens [N] and class if they are known."""

    pixels: NDArray[np.uint8]
    stays: NDArray[np.bool_]
    tokens: Int | None = None
    label: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Find out which tokens stay, generate the others, write and report the variants."""
    started = time.perf_counter()
    if not 1 <= args.count <= MOST_IMAGES:
        raise RequestError(f"--count {args.count}: expected 1 or more, at most {MOST_IMAGES} in one command")
    bundle = Bundle.open(args.bundle)
    if bundle.image_size is None:
        raise RequestError(f"{bundle.path}: this bundle ends at tokens and makes no images; export it with a tokenizer")
    original = read_original(args, bundle)
    keep = kept_tokens(original.stays, bundle.grid[1:])
    kept = int(keep.sum())
    if kept in (0, keep.size):
        side = bundle.image_size[0] // bundle.grid[1]
        raise RequestError(
            f"{'no token stays' if kept == 0 else f'all {kept} tokens stay'}, so there is nothing to edit; a token is "
            f"{side}x{side} pixels, and stays where all of them do: give another region"
        )
    label = original.label if args.label is None else class_index(bundle, args.label)
    if label is None:
        raise RequestError(f"{args.image} does not say its class; give one with --label")
    first = first_seed(args.seed)
    out = args.out or Path(f"{args.image.stem}-edit-{first}.png")
    check_outputs(out, args.tokens)
    tokens = original.tokens
    if tokens is None:  # before the model is loaded, which may take longer
        tokens = Tokenizer(bundle, args.threads).encode(original.pixels)[0]
    pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
    with Bar(args.quiet or args.json) as bar:
        result = pipeline.generate(
            [label] * args.count,
            guidance=args.guidance,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seeds=[first + i for i in range(args.count)],
            greedy=args.greedy,
            guidance_interval=args.guidance_interval,
            on_step=bar,
            keep=keep,
            tokens=tokens,
        )
    if args.paste:
        result = paste(result, original)
    result.save(out, pasted=args.paste)
    if args.tokens is not None:
        write_tokens(args.tokens, result.tokens)
    _report(args, pipeline, result, out, original, keep, time.perf_counter() - started)
    return 0


def read_original(args: argparse.Namespace, bundle: Bundle) -> Original:
    """The image that the command line names, its region, and its tokens where ``bundle`` generated it.

    Raises RequestError, OSError.
    """
    assert bundle.image_size is not None
    size = bundle.image_size
    if args.place is not None:
        box = parse_box(args.place, size)
        return Original(*place_image(open_image(args.image), size, box))
    recipe, sheet = png.read_any(args.image)
    named = region_mask(args.change if args.keep is None else args.keep, size, args.fit)
    stays = ~named if args.keep is None else named
    if recipe is None:
        if args.which is not None:
            raise RequestError(f"--which {args.which}: {args.image} is one image, not a sheet of 'parvis generate'")
        return Original(fit_image(open_image(args.image), size, args.fit), stays)
    count = len(recipe.labels)
    which = 0 if args.which is None and count == 1 else args.which
    if which is None or not 0 <= which < count:
        raise RequestError(f"{args.image} holds {count} images; choose one with --which 0 .. {count - 1}")
    pixels = png.sheet_image(sheet, recipe.columns, count, which)
    if recipe.bundle_hash == bundle.hash and recipe.tokens.shape[1] == bundle.n_tokens:
        return Original(pixels, stays, recipe.tokens[which], recipe.labels[which])
    # Tokens of another bundle have no meaning for this one, so its pixels are encoded.
    if not (args.quiet or args.json):
        print(f"parvis: {args.image} was made by bundle {recipe.bundle_name!r}; encoding its pixels", file=sys.stderr)
    return Original(fit_image(Image.fromarray(pixels), size, args.fit), stays)


def paste(result: Result, original: Original) -> Result:
    """``result`` with the original's pixels where they stay, because decoding changes those of a photo a little."""
    assert result.images is not None
    return replace(result, images=np.where(original.stays[..., None], original.pixels, result.images))


def _report(
    args: argparse.Namespace,
    pipeline: Pipeline,
    result: Result,
    out: Path,
    original: Original,
    keep: NDArray[np.bool_],
    seconds: float,
) -> None:
    """Print what was made, as text or JSON; nothing with --quiet."""
    bundle, label, kept = pipeline.bundle, result.labels[0], int(keep.sum())
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
        images, on = ("images", " and on") if args.count > 1 else ("image", "")
        how = "" if original.tokens is None else " as they were generated"
        print(
            f"{out}: {args.count} {images} of {name}, seed {result.seeds[0]}{on}, "
            f"{kept} of {keep.size} tokens kept{how}, in {seconds:.1f} s"
        )


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis edit``."""
    p = Parser(
        prog="parvis edit",
        description="Make a part of an image anew and keep the rest: inpainting (--change), outpainting (--place), "
        "another class for a part (--keep with --label). A PNG of 'parvis generate' is edited from the tokens it "
        "holds; any other image is encoded first. A token is drawn knowing only what comes before it in the model's "
        "order.",
        epilog=f"REGION: {REGION.removeprefix('expected ')}. Pixels are those of the model's images, after fitting.",
    )
    p.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, ..., or a sheet of 'parvis generate'")
    options.add_bundle_option(p, "the bundle that makes the new part")
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
    options.add_out(p, "PNG to write (default: named after the image and the seed)")
    options.add_tokens(p)
    p.add_argument(
        "--paste", action="store_true", help="put the original's own pixels back where they stay, over the decoded ones"
    )
    options.add_fit(p)
    options.add_guidance(p)
    options.add_sampling(p)
    options.add_common(p)
    options.add_no_selftest(p)
    options.add_json(p)
    return p
