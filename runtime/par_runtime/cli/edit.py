"""``parvis edit``: generate a part of an image again and keep the other part (inpainting, outpainting)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from par_runtime.bundle import Bundle
from par_runtime.checked import shown
from par_runtime.cli import clips, options
from par_runtime.cli.common import Parser, guarded, printable
from par_runtime.cli.inputs import check_sampling, load_pipeline, quiet_readers, read_by_edit, variants
from par_runtime.cli.outputs import (
    check_fps,
    check_outputs,
    check_sheet,
    report_edited,
    say_of_animations,
    write_all,
    write_tokens,
)
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.images.photo import fit_image, place_image
from par_runtime.images.recipe import check as recipe_check
from par_runtime.images.recipe import pixel_hash
from par_runtime.images.region import MASK_FROM, REGION, Beside, kept_tokens, parse_box, region
from par_runtime.request import MOST_OF_A_COMMAND, class_index, first_seed
from par_runtime.result import Result, default_columns
from par_runtime.tokenizer import Tokenizer

#: Of 255: hardly a pixel of a decoder in half precision differs more from one in fp32; what is painted does.
MOST_OFF = 32


@dataclass(frozen=True)
class Original:
    """The image to edit: its pixels [H,W,3], which of them stay [H,W], and its class if it is known.

    ``tokens`` [N] where it is edited from those that made it; else it is encoded, and ``why`` says for what reason.
    ``mask_from``: what of a mask image was taken.
    """

    pixels: NDArray[np.uint8]
    stays: NDArray[np.bool_]
    label: int | None = None
    tokens: Int | None = None
    why: str = "it is no image of parvis"
    mask_from: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "a smaller --count")


def run(args: argparse.Namespace) -> int:
    """Find out which tokens stay, generate the others, write and report the variants."""
    started = time.perf_counter()
    if not 1 <= args.count <= MOST_OF_A_COMMAND:
        raise RequestError(f"--count {args.count}: expected 1 or more, at most {MOST_OF_A_COMMAND} in one command")
    bundle = Bundle.open(args.bundle)
    if bundle.image_size is None:
        raise RequestError(f"{bundle.path}: this bundle ends at tokens and makes no images; export it with a tokenizer")
    check_sampling(args, bundle)
    png.check_scale(args.scale)
    check_fps(bundle, args.fps, [args.out])
    if bundle.video:
        return clips.edit(args, bundle)
    if args.keep_frames is not None:
        raise RequestError(f"--keep-frames {args.keep_frames}: {bundle.path} makes images, not clips; leave it out")
    if args.keep is None and args.change is None and args.place is None:
        raise RequestError("one of the arguments --keep --change --place is required, to say what stays")
    check_sheet(bundle, None, args.count, default_columns(args.count), args.scale)
    with quiet_readers():
        original = read_original(args, bundle)
    keep = kept_tokens(original.stays, bundle.grid[1:])
    kept = int(keep.sum())
    if kept in (0, keep.size):
        side = bundle.image_size[0] // bundle.grid[1]
        cropped = " (what --fit crop cuts off is no part of it)" if original.mask_from and args.fit == "crop" else ""
        raise RequestError(
            f"{'no token stays' if kept == 0 else f'all {kept} tokens stay'}, so there is nothing to edit; a token is "
            f"{side}x{side} pixels, and stays where all of them do: give another region{cropped}"
        )
    label = original.label if args.label is None else class_index(bundle, args.label)
    if label is None:
        raise RequestError(f"{args.image}: its class is not known ({original.why}); give one with --label")
    first = first_seed(args.seed)
    out = args.out or Path(f"{args.image.stem}-edit-{first}.png")
    check_outputs(bundle, out, args.tokens, read_by_edit(args))
    tokens = original.tokens
    if not (args.quiet or args.json):
        say_of_animations([args.image])
        _say_what_was_taken(original)
    if tokens is None:  # before the model is loaded, which may take longer
        with closing(Tokenizer(bundle, args.threads)) as tokenizer:
            tokens = tokenizer.encode(original.pixels)[0]
    pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
    result = variants(args, pipeline, label, first, keep, tokens)
    if args.paste:
        result = paste(result, original)
    files: list[tuple[Path, Callable[[], object]]] = [
        (out, partial(result.save, out, pasted=args.paste, scale=args.scale))
    ]
    if args.tokens is not None:
        files.append((args.tokens, partial(write_tokens, args.tokens, result.tokens)))
    write_all(files)
    why = original.why if original.tokens is None else None
    report_edited(args, pipeline, result, keep, why, started, str(out), mask_from=original.mask_from)
    return 0


def read_original(args: argparse.Namespace, bundle: Bundle) -> Original:
    """The image that the command line names, its region, and its tokens where ``bundle`` generated it.

    Raises RequestError, OSError.
    """
    assert bundle.image_size is not None
    size = bundle.image_size
    if args.place is not None:
        if args.mask_from != "auto":
            raise RequestError(f"--mask-from {args.mask_from}: is for a mask image, --place takes none; leave it out")
        box = parse_box(args.place, size)
        found, *_ = _find(args, bundle)
        # Its tokens are those of its whole size.
        return Original(*place_image(found.image, size, box), found.label, None, found.why)
    original, beside = _without_region(args, bundle, size)
    named = args.change if args.keep is None else args.keep
    where = region(named, size, args.fit, mask_from=args.mask_from, photo=beside)
    if args.mask_from != "auto" and where.mask_from is None:
        raise RequestError(f"--mask-from {args.mask_from}: is for a mask image, {shown(named)} is none; leave it out")
    stays = ~where.pixels if args.keep is None else where.pixels
    return replace(original, stays=stays, mask_from=where.mask_from)


def _without_region(args: argparse.Namespace, bundle: Bundle, size: tuple[int, int]) -> tuple[Original, Beside]:
    """The image, of which nothing stays yet, and what a mask is compared with. The file's pixels are not kept."""
    found, sheet, scale = _find(args, bundle)
    pixels = fit_image(found.image, size, args.fit)
    return Original(pixels, np.zeros(size, bool), found.label, found.tokens, found.why), Beside.of(
        found.image, sheet, scale
    )


def _find(args: argparse.Namespace, bundle: Bundle) -> tuple[_Found, tuple[int, int], int]:
    """The image that the command line names, the size (width, height) of the whole sheet, and how enlarged it was."""
    recipe, image = png.read_any(args.image)
    found = _without_recipe(args, image) if recipe is None else _of_recipe(args, bundle, recipe, image)
    return found, image.size, 1 if recipe is None else recipe.scale


@dataclass(frozen=True)
class _Found:
    """One image of a file, and what the file says about it; the names are those of :class:`Original`."""

    image: Image.Image
    label: int | None = None
    tokens: Int | None = None
    why: str = Original.why


def _without_recipe(args: argparse.Namespace, image: Image.Image) -> _Found:
    if args.which is not None:
        raise RequestError(f"--which {args.which}: {args.image} is one image, not a sheet of 'parvis generate'")
    return _Found(image)


def _of_recipe(args: argparse.Namespace, bundle: Bundle, recipe: png.Recipe, image: Image.Image) -> _Found:
    """The image that ``--which`` names, with the tokens that made it where they still belong to its pixels."""
    count, pixels = len(recipe), np.asarray(image)
    own = recipe.bundle_hash == bundle.hash
    if own:
        recipe_check(recipe, bundle, str(args.image))
    # Another bundle's images may have another size; then the sheet is at least a whole number of images.
    size = bundle.image_size if own else _cell(recipe, pixels)
    if size is None or pixels.shape[:2] != png.sheet_size(count, recipe.columns, size):
        return _of_another_size(args, bundle, recipe, pixels, image)
    which = 0 if args.which is None and count == 1 else args.which
    if which is None or not 0 <= which < count:
        raise RequestError(f"{args.image} holds {count} images; choose one with --which 0 .. {count - 1}")
    one = png.sheet_image(pixels, recipe.columns, count, which)
    found = _Found(Image.fromarray(one), recipe.class_of(which, bundle))
    if not own:  # tokens of another bundle have no meaning for this one
        return replace(found, why=f"{args.image} was made by bundle {shown(recipe.bundle_name)}")
    if _as_written(args, bundle, recipe, which, one):
        return replace(found, tokens=recipe.tokens[which])
    return replace(found, why=f"the pixels of {args.image} were changed since parvis wrote it")


def _cell(recipe: png.Recipe, pixels: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width of one image of a sheet, None where its pixels are no whole number of images."""
    rows, columns = -(-len(recipe) // recipe.columns), recipe.columns
    height, width = pixels.shape[:2]
    return None if height % rows or width % columns else (height // rows, width // columns)


def _of_another_size(
    args: argparse.Namespace, bundle: Bundle, recipe: png.Recipe, pixels: NDArray[np.uint8], image: Image.Image
) -> _Found:
    """A sheet that was cropped, resized or turned since: one picture, which may be exactly one of its images."""
    changed = f"{args.image} has another size than parvis wrote"
    if args.which is not None:
        raise RequestError(
            f"--which {args.which}: {changed}, so its images cannot be told apart; crop the one that you want, and "
            "leave --which out"
        )
    hashes = recipe.pixel_hashes or []
    if recipe.bundle_hash == bundle.hash and (digest := pixel_hash(pixels)) in hashes:
        i = hashes.index(digest)
        return _Found(image, recipe.labels[i], recipe.tokens[i])
    labels = {recipe.class_of(i, bundle) for i in range(len(recipe))}
    return _Found(image, labels.pop() if len(labels) == 1 else None, why=changed)


def _as_written(
    args: argparse.Namespace, bundle: Bundle, recipe: png.Recipe, which: int, pixels: NDArray[np.uint8]
) -> bool:
    """Whether ``pixels`` [H,W,3] are those that the tokens of image ``which`` made."""
    if recipe.pixel_hashes is not None:
        return recipe.pixel_hashes[which] == pixel_hash(pixels)
    # An older file. What another device decoded differs a little; pixels that were pasted over it differ for good.
    tokens = recipe.tokens[which]
    again = Tokenizer(bundle, args.threads, "fp32").decode(tokens)[0]
    off = np.abs(again.astype(np.int16) - pixels) > MOST_OFF
    if recipe.pasted and recipe.kept is not None:
        t, h, w = bundle.grid
        kept = np.empty(t * h * w, bool)
        kept[list(bundle.order)] = recipe.kept[which]
        drawn = ~kept.reshape(h, w)
        off &= np.kron(drawn, np.ones((pixels.shape[0] // h, pixels.shape[1] // w), bool))[..., None]
    return not off.any()


def paste(result: Result, original: Original) -> Result:
    """``result`` with the original's pixels where they stay, because decoding changes those of a photo a little."""
    assert result.images is not None
    return replace(result, images=np.where(original.stays[..., None], original.pixels, result.images))


def _say_what_was_taken(original: Original) -> None:
    """Print what the user may not expect: that an image of parvis is encoded, and how a mask was read."""
    if original.tokens is None and original.why != Original.why:
        print(printable(f"parvis: {original.why}; encoding its pixels"), file=sys.stderr)
    if original.mask_from in ("alpha", "inverse-alpha"):
        part = "opaque" if original.mask_from == "alpha" else "transparent"
        print(f"parvis: the {part} part of the mask is the region (--mask-from {original.mask_from})", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis edit``."""
    p = Parser(
        prog="parvis edit",
        description="Make a part of an image or a clip anew and keep the rest: inpainting (--change), outpainting "
        "(--place), another class for a part (--keep with --label). A PNG of 'parvis generate' is edited from the "
        "tokens it holds; any other image is encoded first. A token is drawn knowing only what comes before it in the "
        "model's order.",
        epilog=f"REGION: {REGION.removeprefix('expected ')}. Pixels are those of the model's images, after fitting.",
    )
    p.add_argument(
        "image",
        type=options.path,
        metavar="IMAGE",
        help="PNG, JPEG, WebP, ..., or a sheet of 'parvis generate'; of a video bundle a clip",
    )
    options.add_bundle_option(p, "the bundle that makes the new part")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--keep", metavar="REGION", help="what stays; the rest is made anew")
    where.add_argument("--change", metavar="REGION", help="what is made anew; the rest stays")
    where.add_argument(
        "--place", metavar="X0,Y0,X1,Y1", help="shrink the image into this box and make what is around it"
    )
    p.add_argument(
        "--keep-frames",
        type=int,
        metavar="K",
        help="of a clip, or a picture (K = 1): the first K frames stay, and what comes after them is made; behind the "
        "first one they stay some at a time (docs/video.md)",
    )
    p.add_argument(
        "--mask-from",
        choices=MASK_FROM,
        default="auto",
        help="what of a mask image marks the region: 'brightness' (white), 'alpha' (what is opaque: strokes on a "
        "transparent layer), 'inverse-alpha' (what is transparent: a hole in the photo); default: the one that fits",
    )
    p.add_argument(
        "--label",
        type=options.text,
        help="class of the result (default: the image's own, if 'parvis generate' made it; of another bundle, by name)",
    )
    p.add_argument("--which", type=int, metavar="I", help="the image of a sheet to edit, from 0, row by row")
    p.add_argument("--count", type=int, default=1, help="variants to make (default: 1)")
    p.add_argument("--seed", type=int, help="of the first variant (default: a new one each time)")
    options.add_out(p, "PNG to write, or the file of a clip (default: named after the image and the seed)")
    options.add_scale(p)
    options.add_fps(p)
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
