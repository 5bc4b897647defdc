"""``parvis generate``: images from a bundle, as one sheet, as one file each, or as tokens."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Bar, Parser, guarded, printable
from par_runtime.cli.inputs import check_batch, check_sampling, class_indices, load_pipeline, say_why_on_the_cpu
from par_runtime.cli.outputs import (
    check_fps,
    check_out_name,
    check_sheet,
    check_tokens_name,
    class_file_name,
    image_file_names,
    safe_name,
    seeds_in_words,
    sheet_columns,
    suffix_of,
    write_all,
    write_tokens,
)
from par_runtime.cli.previews import Previews, check_previews
from par_runtime.errors import RequestError
from par_runtime.images import png
from par_runtime.pipeline import Pipeline
from par_runtime.request import MOST_OF_A_COMMAND, first_seed, image_seeds
from par_runtime.result import Result
from par_runtime.system import check_different, check_folder_writable, check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 on bad input."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), "fewer images, --batch")


def run(args: argparse.Namespace) -> int:
    """Check the request, load the bundle, make the images, write and report them."""
    started = time.perf_counter()
    bundle, classes, first = _checked(args)
    pipeline = load_pipeline(args, bundle, selftest=not args.no_selftest)
    loaded = time.perf_counter()
    check_batch(args, pipeline)
    say_why_on_the_cpu(args, pipeline)
    # Images run label by label; several guidance scales repeat all of them, with the same seeds.
    scales = len(args.guidance or [None])
    labels = [c for c in classes for _ in range(args.count)]
    seeds = image_seeds(len(labels), first, None)
    guidance = None if args.guidance is None else [s for s in args.guidance for _ in labels]
    columns = args.columns or sheet_columns(bundle, len(classes), args.count, scales)

    if args.batch is None:  # only now is it known how many calls there are
        images = len(labels) * scales
        check_previews(
            args, bundle, images, min(images, pipeline.default_batch), _outputs(args, bundle, classes, first)
        )
    with Bar(args.quiet or args.json) as bar:
        result = pipeline.generate(
            labels * scales,
            **options.sampling(args) | {"guidance": guidance},
            seeds=seeds * scales,
            on_step=bar,
            preview_every=args.preview_every,
            on_preview=None if args.preview_every is None else Previews(args, bundle, columns, bar),
            max_batch=args.batch,
            decode=args.out is not None or args.out_dir is not None,
        )
    written = _write(args, bundle, result, columns)
    _report(args, bundle, pipeline, result, written, loaded - started, time.perf_counter() - started)
    return 0


def _checked(args: argparse.Namespace) -> tuple[Bundle, list[int], int]:
    """Everything that can be checked before the bundle is loaded: the opened bundle, the classes, the first seed.

    ``args.out`` is set where no output was given. Raises RequestError, BundleError, OSError.
    """
    options.check_counts(args, "count", "columns", "batch", "preview_every")
    check_batch(args)
    png.check_scale(args.scale)
    check_tokens_name(args.tokens)
    bundle = Bundle.open(args.bundle)
    check_sampling(args, bundle)
    check_out_name(bundle, args.out)
    # Files in --out-dir, and one that nobody names, have the default ending.
    check_fps(bundle, args.fps, [args.out] + [None] * (args.out_dir is not None))
    classes = class_indices(bundle, args.label)
    total = len(classes) * args.count * len(args.guidance or [1])
    if total > MOST_OF_A_COMMAND:
        raise RequestError(
            f"--count {args.count} makes {total} images; expected at most {MOST_OF_A_COMMAND} in one command: give a "
            "smaller --count and run it again with other seeds"
        )
    first = first_seed(args.seed)
    if bundle.image_size is None and (args.out or args.out_dir or not args.tokens):
        raise RequestError(
            f"{bundle.path}: this bundle ends at tokens and makes no images; give --tokens X.npy instead"
        )
    if args.out is None and args.out_dir is None and args.tokens is None:
        what = class_file_name(bundle, classes[0]) if len(classes) == 1 else f"{len(classes)}-classes"
        args.out = Path(f"{safe_name(bundle.name)}-{what}-{first}{suffix_of(bundle)}")
    if args.preview_every is not None and args.out is None:
        raise RequestError(f"--preview-every writes beside --out; give --out X{suffix_of(bundle)}")
    if args.out_dir is not None:
        check_sheet(bundle, None, 1, 1, args.scale)
    if args.out is not None:
        columns = args.columns or sheet_columns(bundle, len(classes), args.count, len(args.guidance or [1]))
        check_sheet(bundle, args.out, total, columns, args.scale)
    if args.out_dir is not None and len(set(args.guidance or ())) < len(args.guidance or ()):
        raise RequestError(
            "--guidance: a scale is given twice, so two images would have one file name; give each scale once"
        )
    outputs = _outputs(args, bundle, classes, first)
    check_different(outputs)
    for path in (args.out, args.tokens):
        if path is not None:
            check_writable(path)
    if args.out_dir is not None:
        check_folder_writable(args.out_dir)
        if (folder := next((path for path in outputs if path.is_dir()), None)) is not None:
            raise RequestError(
                f"{folder} is a folder, but this command would write a file of that name; give another --out-dir"
            )
    check_previews(args, bundle, total, total if args.batch is None else args.batch, outputs)
    return bundle, classes, first


def _outputs(args: argparse.Namespace, bundle: Bundle, classes: Sequence[int], first: int) -> list[Path]:
    """The files that are asked for, without previews."""
    outputs = [path for path in (args.out, args.tokens) if path is not None]
    if args.out_dir is not None:
        labels = [c for c in classes for _ in range(args.count)]
        scales = [s for s in args.guidance or [bundle.defaults.guidance] for _ in labels]
        repeats = len(scales) // len(labels)
        names = image_file_names(bundle, labels * repeats, image_seeds(len(labels), first, None) * repeats, scales)
        outputs += [args.out_dir / name for name in names]
    return outputs


def _write(args: argparse.Namespace, bundle: Bundle, result: Result, columns: int) -> list[str]:
    """Write all that was asked for; the names of the files. Raises OutputsError, OSError."""
    files: list[tuple[Path, Callable[[], object]]] = []
    if args.out is not None:
        files.append((args.out, partial(result.save, args.out, columns, scale=args.scale, fps=args.fps)))
    if args.out_dir is not None:
        names = image_file_names(bundle, result.labels, result.seeds, [s.guidance for s in result.settings])
        for i, name in enumerate(names):
            path = args.out_dir / name
            files.append((path, partial(result.save, path, 1, [i], scale=args.scale, fps=args.fps)))
    if args.tokens is not None:
        files.append((args.tokens, partial(write_tokens, args.tokens, result.tokens)))
    return write_all(files)


def _report(
    args: argparse.Namespace,
    bundle: Bundle,
    pipeline: Pipeline,
    result: Result,
    written: list[str],
    load_s: float,
    total_s: float,
) -> None:
    """Print what was made, where it is and how long it took, as text or JSON; nothing with --quiet."""
    count = len(result.labels)
    ms = result.timings["total"] / count
    if args.json:
        row = {
            "written": written,
            "bundle": {"name": bundle.name, "hash": bundle.hash},
            "backend": pipeline.backend.info.name,
            "decoder": pipeline.backend.info.decoder,
            "note": pipeline.note,
            "images": count,
            **({"frames": bundle.frames} if bundle.video else {}),
            "labels": result.labels,
            "seeds": result.seeds,
            "settings": [asdict(s) for s in result.settings],
            "load_ms": 1e3 * load_s,
            "ms_per_image": ms,
            "timings_ms": result.timings,
        }
        print(json.dumps(row))
        return
    if args.quiet:
        return
    in_folder = f"{count} files in {args.out_dir}" if args.out_dir else ""
    named = [str(path) for path in (args.out, args.tokens) if path is not None]
    where = ", ".join(([in_folder] if in_folder else []) + named)
    one = "clip" if bundle.video else "image"
    info = pipeline.backend.info
    decoded = "" if info.decoder_computes == "fp32" else f", decoded in {info.decoder_computes}"
    print(
        f"{printable(where)}: {count} {one}{'s' if count > 1 else ''}, {seeds_in_words(result.seeds)}, in "
        f"{total_s:.1f} s "
        f"({load_s:.1f} s to load, {ms:.0f} ms per {one}, {bundle.calls} calls, {pipeline.backend.info.name}{decoded})"
    )


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis generate``."""
    p = Parser(
        prog="parvis generate",
        description="Make images from a bundle, or clips from a video bundle. Image i of the list draws with seed + i; "
        "the same seed, label and settings give the same image, alone or in any batch, where CPU or GPU round alike.",
    )
    options.add_bundle(p)
    options.add_labels(p, "classes, each by name, index or synset; 'all' is every class", required=True)
    p.add_argument("--count", type=int, default=1, help="images or clips per label (default: 1)")
    p.add_argument("--seed", type=int, help="of the first image, 0 .. 2**64-1 (default: a new one each time)")
    options.add_out(
        p,
        "PNG to write: all images in one sheet, with what is needed to make it again; of a video bundle a .gif, .webp, "
        ".apng or .mp4 (default: named after bundle, class and seed)",
    )
    options.add_scale(p)
    options.add_fps(p)
    p.add_argument("--out-dir", type=options.path, help="folder for one PNG per image, or one GIF per clip")
    options.add_tokens(p)
    p.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        action="extend",
        help="guidance scale; several make a row of images each, with the same seeds (default: the bundle's)",
    )
    options.add_sampling(p)
    p.add_argument("--columns", type=int, help="images or clips per row of the sheet")
    p.add_argument("--batch", type=int, help="most images in flight at once (default: a cache of 2 GB)")
    p.add_argument(
        "--preview-every",
        type=int,
        metavar="CALLS",
        help="write X-0010.png, ... beside --out as the image fills (of a clip its latest frame)",
    )
    options.add_common(p)
    options.add_no_selftest(p)
    options.add_json(p)
    return p
