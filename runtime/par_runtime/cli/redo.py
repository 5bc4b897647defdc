"""``parvis redo``: make a PNG, or a clip, again from its own metadata, and compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import Bundle
from par_runtime.cli import clips, options
from par_runtime.cli.common import Parser, guarded, printable
from par_runtime.cli.inputs import (
    PIXEL_TOLERANCE,
    check_recipe,
    made_again,
    other_decoder,
    quiet_readers,
    then_and_now,
)
from par_runtime.cli.outputs import check_not_input
from par_runtime.clips import files as clip_files
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.result import Result
from par_runtime.system import check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0 if tokens are identical, and pixels but for rounding; 1 if not, 2 if it cannot be
    tried.
    """
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Make the images of the PNG again, write them if asked, and print how they compare."""
    bundle = Bundle.open(args.bundle)
    if bundle.video and bundle.image_size is not None:
        return clips.redo(args, bundle)
    with quiet_readers():
        recipe, image = png.read_any(args.image)
        found = clip_files.recipe_of(args.image) if recipe is None else recipe  # of a GIF, for instance
    if found is not None and found.fps is not None:
        raise RequestError(
            f"{args.image}: holds clips, and {bundle.path} makes images; give the --bundle that made them"
        )
    recipe, pixels = png.with_recipe(args.image, recipe, image)
    check_recipe(args, bundle, recipe)
    if bundle.image_size is None:
        raise RequestError(f"{bundle.path}: this bundle ends at tokens, so it has made no image; give another --bundle")
    wanted = png.sheet_size(len(recipe), recipe.columns, bundle.image_size)
    if pixels.shape[:2] != wanted:  # now, because making the images may take long
        raise RequestError(
            f"{args.image} has {pixels.shape[1]}x{pixels.shape[0]} pixels, its {len(recipe)} images had "
            f"{wanted[1]}x{wanted[0]}: it was cropped, resized or turned since parvis wrote it; give an undamaged copy"
        )
    if recipe.given == recipe.tokens.size:
        raise RequestError(
            f"{args.image}: there is nothing to make again: all its {recipe.given} tokens were given, none was drawn; "
            "give a PNG of 'parvis generate' or 'parvis edit'"
        )
    if args.out is not None:
        check_not_input(args.out, [args.image])
        check_writable(args.out)
    pipeline, result = made_again(args, bundle, recipe)
    if args.out is not None:
        result.save(args.out, recipe.columns, scale=recipe.scale)
    identical, text = compare(recipe, pixels, result, bundle.image_size)
    if (result.tokens != recipe.tokens).any():
        text += f" ({then_and_now(recipe, pipeline.backend.info)})"
    print(printable(f"{args.image}: {text}"))
    return 0 if identical else 1


def compare(recipe: png.Recipe, pixels: NDArray[np.uint8], result: Result, size: tuple[int, int]) -> tuple[bool, str]:
    """Whether ``result`` is what a PNG with this recipe and these pixels [H,W,3] shows, and a sentence about it.

    ``size`` (H, W) of one image; the pixels have the sheet's.
    """
    differing = np.argwhere(result.tokens != recipe.tokens)
    if len(differing):
        image, position = differing[0]
        return False, (
            f"different: image {image} (label {recipe.labels[image]}, seed {recipe.seeds[image]}) first differs "
            f"at token {position}: {recipe.tokens[image, position]} then, {result.tokens[image, position]} now; "
            f"{len(differing)} of all {result.tokens.size} tokens differ"
        )
    # A token that was given is the same without proving anything.
    given = f" ({result.tokens.size - recipe.given} of them drawn, the others given)" if recipe.given else ""
    identical = f"identical: {len(recipe)} image{'s' if len(recipe) > 1 else ''}, {result.tokens.size} tokens{given}"
    unchanged = png.same_pixels(recipe, pixels, size)
    changed = ""
    if unchanged is not None and not all(unchanged):
        changed = f"{unchanged.count(False)} of {len(recipe)} images were changed since parvis wrote them"
    if recipe.pasted:
        if changed:
            return False, f"different: the tokens are the same, the pixels are not ({changed})"
        since = "" if unchanged is None else ", and none was changed since"
        return True, (
            f"{identical}; the pixels were not compared, because those of the original were pasted over the kept ones"
            f"{since}"
        )
    assert result.images is not None
    again = png.sheet(result.images, recipe.columns)
    if (again == pixels).all():
        if recipe.scale > 1 and changed:  # so little that the mean of the square is what it was
            return False, f"different: the tokens are the same, the pixels are not ({changed})"
        return True, f"{identical}, every pixel"
    most, decoders = int(np.abs(again.astype(int) - pixels).max()), other_decoder(recipe, result)
    if most <= PIXEL_TOLERANCE and not changed:
        count = int((again != pixels).any(-1).sum())
        known = None not in (recipe.made_on, result.made_on)
        why = f" ({decoders})" if decoders else "" if known else ", as another decoder rounds them"
        return True, f"{identical}; {count} of its pixels differ by {most} of 255{why}"
    detail = f"{int((again != pixels).any(-1).sum())} pixels, by up to {most} of 255"
    why = changed
    if unchanged is not None and not changed:
        why = "another --device or --decoder-precision decodes otherwise, and so does another CPU in bf16"
        why = f"{decoders}; {why}" if decoders else why
    return False, f"different: the tokens are the same, the pixels are not ({detail}{'; ' if why else ''}{why})"


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis redo``."""
    p = Parser(
        prog="parvis redo",
        description="Make a PNG or a clip of 'parvis generate' or 'edit' again from its own metadata and compare "
        "pixels and tokens. On a CPU it is computed in the precisions that it was made in, where no option says "
        "otherwise. Exit code 0: identical (pixels of another decoder may differ by one grey level, and those of a GIF "
        "or MP4 by what such a file loses); 1: different; 2: cannot be tried.",
    )
    p.add_argument(
        "image",
        type=options.path,
        metavar="IMAGE",
        help="a PNG of 'parvis generate' or 'edit', or a clip (GIF, WebP, animated PNG, MP4)",
    )
    options.add_bundle_option(p, "the bundle that made it")
    options.add_out(p, "also write the new PNG or clip here")
    options.add_common(p, quiet="no progress bar")
    return p
