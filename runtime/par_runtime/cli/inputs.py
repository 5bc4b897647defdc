"""What the arguments of several verbs mean: classes, and the bundle loaded on the device that they name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from par_runtime.backends.base import MOST_IN_FLIGHT, BackendInfo
from par_runtime.backends.engines import has_engines
from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Bar, printable
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError
from par_runtime.images.recipe import Recipe, check
from par_runtime.pipeline import Pipeline
from par_runtime.request import class_index, image_seeds, image_settings
from par_runtime.result import Result

#: Between two decoders in fp32, for instance in C and on ONNX Runtime, in grey levels of 255: they round differently.
PIXEL_TOLERANCE = 1


def class_indices(bundle: Bundle, labels: Sequence[str]) -> list[int]:
    """Class indices of the command line's labels; "all" is every class. Raises RequestError."""
    each = [range(bundle.n_classes) if label == "all" else [class_index(bundle, label)] for label in labels]
    return [index for indices in each for index in indices]


def check_sampling(args: argparse.Namespace, bundle: Bundle) -> None:
    """Raise RequestError for a bad value of ``add_sampling`` or ``--guidance`` (one scale, several, or None)."""
    scales = args.guidance
    image_settings(bundle, len(scales) if isinstance(scales, list) else 1, **options.sampling(args))


def read_by_edit(args: argparse.Namespace) -> list[Path]:
    """The files that ``parvis edit`` reads: the picture or clip, and a mask."""
    masks = [Path(named) for named in (args.keep, args.change) if named and os.path.exists(named)]
    return [args.image, *masks]


@contextmanager
def quiet_readers() -> Iterator[None]:
    """While pictures are read: the C libraries behind Pillow print lines of their own about a damaged file.

    The one line that the verb prints says it all. Only for the command line, where no other thread writes.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def load_pipeline(args: argparse.Namespace, bundle: Bundle, selftest: bool) -> Pipeline:
    """Load ``bundle``, which is opened already, with the options of ``add_common``. Errors as in ``Pipeline.load``."""
    with Bar(args.quiet or getattr(args, "json", False), of_bytes=True) as bar:
        return Pipeline.load(
            args.bundle,
            args.device,
            threads=args.threads,
            selftest=selftest,
            # Opening the bundle hashed its own files, but not those of its engines.
            verify="auto" if has_engines(bundle) else "none",
            capture=args.capture,
            **options.rounding(args)._asdict(),
            on_load=bar,
        )


def check_batch(args: argparse.Namespace, pipeline: Pipeline | None = None) -> None:
    """Raise RequestError where ``--batch`` is more than ``pipeline`` takes, or, before it is loaded, any can take."""
    most, where = MOST_IN_FLIGHT, ""
    if pipeline is not None:
        most, where = pipeline.backend.max_images, f" on {pipeline.backend.info.name}"
    if args.batch is not None and args.batch > most:
        raise RequestError(f"--batch {args.batch}: expected 1 to {most}{where}")


def say_why_on_the_cpu(args: argparse.Namespace, pipeline: Pipeline) -> None:
    """Print why a bundle with engines runs on the CPU all the same."""
    if pipeline.note and has_engines(pipeline.bundle) and not (args.quiet or args.json):
        what, _, why = pipeline.note.partition(": ")  # it may end in a command, so nothing is put behind it
        print(printable(f"parvis: {what} (--device cpu silences this): {why}"), file=sys.stderr)


def variants(
    args: argparse.Namespace, pipeline: Pipeline, label: int, first: int, keep: NDArray[np.bool_], tokens: Int
) -> Result:
    """The ``--count`` variants of ``parvis edit``, from seed ``first`` on: ``tokens`` [N] stay where ``keep`` is."""
    with Bar(args.quiet or args.json) as bar:
        return pipeline.generate(
            [label] * args.count,
            **options.sampling(args),
            seeds=image_seeds(args.count, first, None),
            on_step=bar,
            keep=keep,
            tokens=tokens,
        )


def check_recipe(args: argparse.Namespace, bundle: Bundle, recipe: Recipe) -> None:
    """Raise RequestError unless ``recipe``, of the file ``args.image``, is one that ``bundle`` can make again."""
    if bundle.hash != recipe.bundle_hash:
        raise RequestError(
            f"{args.image} was made by bundle {recipe.bundle_name!r} with hash {recipe.bundle_hash[:12]}; "
            f"{args.bundle} has hash {bundle.hash[:12]}: give --bundle with the one that made it"
        )
    check(recipe, bundle, str(args.image))


def _as_made(args: argparse.Namespace, recipe: Recipe) -> argparse.Namespace:
    """``args``; what they leave open of a CPU's rounding is that of ``recipe``, where this is known."""
    then = {} if recipe.made_on is None else recipe.made_on.rounding
    open_ones = {name: was for name, was in then.items() if getattr(args, name) == "auto"}
    return argparse.Namespace(**(vars(args) | open_ones))


def then_and_now(recipe: Recipe, now: BackendInfo) -> str:
    """On what tokens were drawn that differ, and why they may."""
    options = "another --device, --arithmetic or --cache rounds otherwise"
    if recipe.made_on is None:
        return f"now on {now.name}; {options}: give those it was made with"
    then, was, is_now = recipe.made_on.backend, recipe.made_on.rounding, now.rounding
    where = f"on {then} then and now" if then == now.name else f"then on {then}, now on {now.name}"
    known = [name for name in ("arithmetic", "cache") if name in was and name in is_now]
    other = [f"{name} {was[name]} then, {is_now[name]} now" for name in known if was[name] != is_now[name]]
    if other:
        return f"{where}; {', '.join(other)}"
    if then == now.name:
        return f"{where}; another CPU or GPU may round otherwise, or the file's entry was changed"
    if known:
        return f"{where}; in the same precisions another backend or CPU rounds otherwise"
    return f"{where}; {options}"


def other_decoder(recipe: Recipe, result: Result) -> str:
    """What decoded ``recipe`` and ``result``, where both are known and not the same; else ""."""
    then, now = ("" if each is None else each.decoder for each in (recipe.made_on, result.made_on))
    return f"decoded by {then} then, by {now} now" if then and now and then != now else ""


def made_again(args: argparse.Namespace, bundle: Bundle, recipe: Recipe) -> tuple[Pipeline, Result]:
    """The images or clips of ``recipe``, and the pipeline that made them. Errors as in :func:`load_pipeline`."""
    # What follows compares tokens: a stricter self-test than the bundle's own.
    pipeline = load_pipeline(_as_made(args, recipe), bundle, selftest=False)
    with Bar(args.quiet) as bar:
        return pipeline, pipeline.generate(
            recipe.labels,
            recipe.settings,
            seeds=recipe.seeds,
            on_step=bar,
            keep=None if recipe.kept is None else pipeline.grid_tokens(recipe.kept),
            tokens=None if recipe.kept is None else recipe.tokens,
        )
