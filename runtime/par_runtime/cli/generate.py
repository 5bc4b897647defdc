"""``parvis generate`` and ``parvis redo``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.engines import has_engines
from par_runtime.bundle import Bundle
from par_runtime.cli.common import (
    MOST_IMAGES,
    Bar,
    add_common,
    add_sampling,
    classes_of,
    columns_of,
    file_name,
    guarded,
    safe_name,
    save_tokens,
    unchecked,
)
from par_runtime.cli.dispatch import Parser
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.pipeline import Pipeline, Result
from par_runtime.system import check_writable, write_beside


def generate(argv: Sequence[str]) -> int:
    """Make images: ``parvis generate BUNDLE --label L --count K --seed S --out X.png``."""
    args = _generate_parser().parse_args(argv)
    return guarded(lambda: _generate(args))


def redo(argv: Sequence[str]) -> int:
    """Make a PNG again and compare: exit code 0 if pixels and tokens are identical, 1 if not."""
    args = _redo_parser().parse_args(argv)
    return guarded(lambda: _redo(args))


def _generate(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    for option, value in (("--count", args.count), ("--columns", args.columns), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise RequestError(f"{option} {value}: expected 1 or more")
    if args.out is not None and args.out.suffix.lower() != ".png" and not args.out.is_dir():
        raise RequestError(
            f"--out {args.out}: expected a name that ends in .png (what makes an image again is kept in its metadata)"
        )
    if args.tokens is not None and args.tokens.suffix != ".npy":
        raise RequestError(f"--tokens {args.tokens}: expected a name that ends in .npy")
    bundle = Bundle.open(args.bundle)
    classes = classes_of(bundle, args.label)
    total = len(classes) * args.count * len(args.guidance or [1])
    if total > MOST_IMAGES:
        raise RequestError(
            f"--count {args.count} makes {total} images; expected at most {MOST_IMAGES} in one command: give a smaller "
            "--count and run it again with other seeds"
        )
    first = args.seed if args.seed is not None else int(np.random.default_rng().integers(2**32))
    if bundle.image_size is None and (args.out or args.out_dir or not args.tokens):
        raise RequestError(
            f"{bundle.path}: this bundle ends at tokens and makes no images; give --tokens X.npy instead"
        )
    if args.out is None and args.out_dir is None and args.tokens is None:
        what = file_name(bundle, classes[0]) if len(classes) == 1 else f"{len(classes)}-classes"
        args.out = Path(f"{safe_name(bundle.name)}-{what}-{first}.png")
    if args.preview_every is not None and args.out is None:
        raise RequestError("--preview-every writes beside --out; give --out X.png")
    for path in (args.out, args.out_dir and args.out_dir / "x.png", args.tokens):
        if path is not None:
            check_writable(path)
    # Checked above, so not again.
    pipeline = Pipeline.load(
        args.bundle,
        args.device,
        threads=args.threads,
        selftest=not args.no_selftest,
        verify=unchecked(bundle),
        capture=args.capture,
    )
    loaded = time.perf_counter()
    if pipeline.note and has_engines(bundle) and not (args.quiet or args.json):
        print(f"parvis: {pipeline.note}", file=sys.stderr)
    # Images run label by label; several guidance scales repeat all of them, with the same seeds.
    scales: list[float | None] = args.guidance or [None]
    labels = [c for c in classes for _ in range(args.count)] * len(scales)
    per_scale = len(labels) // len(scales)
    seeds = [first + i for i in range(per_scale)] * len(scales)
    guidance = None if args.guidance is None else [s for s in args.guidance for _ in range(per_scale)]
    columns = args.columns or columns_of(len(classes), args.count, len(scales))

    def show(images: NDArray[np.uint8], done: int, total: int) -> None:
        from PIL import Image

        name = args.out.with_name(f"{args.out.stem}-{done:04d}.png")
        write_beside(name, lambda part: Image.fromarray(png.sheet(images, columns)).save(part, format="PNG"))

    with Bar(args.quiet or args.json) as bar:
        result = pipeline.generate(
            labels,
            guidance=guidance,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seeds=seeds,
            greedy=args.greedy,
            on_step=bar,
            preview_every=args.preview_every,
            on_preview=None if args.preview_every is None else show,
            max_batch=args.batch,
            decode=args.out is not None or args.out_dir is not None,
        )
    written = _write(args, bundle, result, columns)
    _report(args, bundle, pipeline, result, written, loaded - started, time.perf_counter() - started)
    return 0


def _write(args: argparse.Namespace, bundle: Bundle, result: Result, columns: int) -> list[str]:
    written = []
    if args.out is not None:
        png.write(args.out, bundle, result, columns)
        written.append(str(args.out))
    if args.out_dir is not None:
        several = len({s.guidance for s in result.settings}) > 1
        for i, label in enumerate(result.labels):
            scale = f"-g{result.settings[i].guidance:g}" if several else ""
            path = args.out_dir / f"{file_name(bundle, label)}-{result.seeds[i]}{scale}.png"
            png.write(path, bundle, result, 1, [i])
            written.append(str(path))
    if args.tokens is not None:
        write_beside(args.tokens, lambda part: save_tokens(part, result.tokens))
        written.append(str(args.tokens))
    return written


def _report(
    args: argparse.Namespace,
    bundle: Bundle,
    pipeline: Pipeline,
    result: Result,
    written: list[str],
    load_s: float,
    total_s: float,
) -> None:
    count = len(result.labels)
    if args.json:
        row = {
            "written": written,
            "bundle": {"name": bundle.name, "hash": bundle.hash},
            "backend": pipeline.backend.info.name,
            "note": pipeline.note,
            "images": count,
            "labels": result.labels,
            "seeds": result.seeds,
            "settings": [asdict(s) for s in result.settings],
            "load_ms": 1e3 * load_s,
            "ms_per_image": result.timings["total"] / count,
            "timings_ms": result.timings,
        }
        print(json.dumps(row))
        return
    if args.quiet:
        return
    in_folder = f"{count} files in {args.out_dir}" if args.out_dir else ""
    named = [str(path) for path in (args.out, args.tokens) if path is not None]
    where = ", ".join(([in_folder] if in_folder else []) + named)
    ms = result.timings["total"] / count
    low, high = min(result.seeds), max(result.seeds)
    print(
        f"{where}: {count} image{'s' if count > 1 else ''}, seed{f's {low}..{high}' if high > low else f' {low}'}, in {total_s:.1f} s "
        f"({load_s:.1f} s to load, {ms:.0f} ms per image, {bundle.calls} calls, {pipeline.backend.info.name})"
    )


def _redo(args: argparse.Namespace) -> int:
    recipe, pixels = png.read(args.image)
    bundle = Bundle.open(args.bundle)
    if bundle.hash != recipe.bundle_hash:
        raise RequestError(
            f"{args.image} was made by bundle {recipe.bundle_name!r} with hash {recipe.bundle_hash[:12]}; "
            f"{args.bundle} has hash {bundle.hash[:12]}: give --bundle with the one that made it"
        )
    if recipe.tokens.shape != (len(recipe.labels), bundle.n_tokens):
        raise RequestError(
            f"{args.image}: its 'parvis' entry is damaged: {recipe.tokens.shape[1]} tokens an image, the bundle makes {bundle.n_tokens}"
        )
    if args.out is not None:
        check_writable(args.out)
    # The comparison below is a stricter self-test than the bundle's own.
    pipeline = Pipeline.load(
        args.bundle, args.device, threads=args.threads, selftest=False, verify=unchecked(bundle), capture=args.capture
    )
    with Bar(args.quiet) as bar:
        result = pipeline.generate(
            recipe.labels,
            recipe.settings,
            seeds=recipe.seeds,
            on_step=bar,
            keep=None if recipe.kept is None else pipeline.grid_tokens(recipe.kept),
            tokens=None if recipe.kept is None else recipe.tokens,
        )
    if args.out is not None:
        png.write(args.out, bundle, result, recipe.columns)
    assert result.images is not None
    again = png.sheet(result.images, recipe.columns)
    differing = np.argwhere(result.tokens != recipe.tokens)
    if len(differing):
        image, position = differing[0]
        print(
            f"{args.image}: different: image {image} (label {recipe.labels[image]}, seed {recipe.seeds[image]}) first "
            f"differs at token {position}: {recipe.tokens[image, position]} then, {result.tokens[image, position]} now; "
            f"{len(differing)} of {result.tokens.size} tokens differ"
        )
        return 1
    if recipe.pasted:
        print(
            f"{args.image}: identical: {len(recipe.labels)} images, {result.tokens.size} tokens; the pixels were not compared, "
            "because those of the original were pasted over the kept ones"
        )
        return 0
    if again.shape != pixels.shape or (again != pixels).any():
        detail = (
            f"size {pixels.shape[1]}x{pixels.shape[0]} then, {again.shape[1]}x{again.shape[0]} now"
            if again.shape != pixels.shape
            else f"{int((again != pixels).any(-1).sum())} pixels, by up to {int(np.abs(again.astype(int) - pixels).max())} of 255"
        )
        print(f"{args.image}: different: the tokens are the same, the pixels are not ({detail})")
        return 1
    print(f"{args.image}: identical: {len(recipe.labels)} images, {result.tokens.size} tokens, every pixel")
    return 0


def _generate_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis generate",
        description="Make images from a bundle. Image i of the list draws with seed + i; the same seed, label and "
        "settings give the same image, alone or in any batch.",
    )
    p.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="folder made by 'parvis export', for instance models/demo"
    )
    p.add_argument(
        "--label", action="append", required=True, help="class name or index; may be repeated; 'all' is every class"
    )
    p.add_argument("--count", type=int, default=1, help="images per label (default: 1)")
    p.add_argument("--seed", type=int, help="of the first image, 0 .. 2**64-1 (default: a new one each time)")
    p.add_argument(
        "--out",
        type=Path,
        help="PNG to write: all images in one sheet, with what is needed to make it again (default: named after bundle, class and seed)",
    )
    p.add_argument("--out-dir", type=Path, help="folder for one PNG per image")
    p.add_argument("--tokens", type=Path, help=".npy to write: tokens [B,N] int64 in sequence order")
    p.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        help="guidance scale; several make a row of images each, with the same seeds (default: the bundle's)",
    )
    add_sampling(p)
    p.add_argument("--columns", type=int, help="images per row of the sheet")
    p.add_argument("--batch", type=int, help="most images in flight at once (default: a cache of 2 GB)")
    p.add_argument(
        "--preview-every", type=int, metavar="CALLS", help="write X-0010.png, ... beside --out as the image fills"
    )
    add_common(p)
    p.add_argument("--no-selftest", action="store_true", help="do not check the bundle's test tokens first")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


def _redo_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="parvis redo",
        description="Make a PNG of 'parvis generate' again from its own metadata and compare pixels and tokens. "
        "Exit code 0: identical; 1: different; 2: cannot be tried.",
    )
    p.add_argument("image", type=Path, metavar="IMAGE.png")
    p.add_argument("--bundle", type=Path, required=True, help="the bundle that made it")
    p.add_argument("--out", type=Path, help="also write the new PNG here")
    add_common(p)
    return p
