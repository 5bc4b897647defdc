"""``parvis labels``: the classes of a bundle, and those whose name has a word in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from par_runtime.bundle import Bundle
from par_runtime.cli import options
from par_runtime.cli.common import Parser, guarded
from par_runtime.errors import RequestError
from par_runtime.request import classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0, or 2 where the bundle cannot be read or no class matches."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Print the classes, one a line: index, name and synset, with tabs between; or JSON."""
    bundle = Bundle.open(args.bundle, verify="none")
    rows = [row for row in classes(bundle) if all(_has(row, word) for word in args.word)]
    if not rows and bundle.class_names is None:
        raise RequestError(
            f"{bundle.path}: this bundle has no class names to search, only indices 0..{bundle.n_classes - 1}; "
            "'parvis export --class-names FILE' gives names to a bundle"
        )
    if not rows:
        raise RequestError(
            f"no class of {bundle.path} has {' and '.join(map(repr, args.word))} in its name; 'parvis labels "
            f"{bundle.path}' lists all {bundle.n_classes}"
        )
    if args.json:
        print(json.dumps({"bundle": {"name": bundle.name, "hash": bundle.hash}, "classes": rows}))
    else:
        for row in rows:
            print("\t".join(str(value) for value in row.values() if value is not None))
    return 0


def _has(row: dict[str, int | str | None], word: str) -> bool:
    word = word.casefold()
    return word in str(row["name"] or "").casefold() or word in (str(row["index"]), row["synset"])


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis labels``."""
    p = Parser(
        prog="parvis labels",
        description="List the classes of a bundle, as --label takes them: index, name and, for ImageNet, synset.",
    )
    options.add_bundle(p)
    p.add_argument(
        "word", nargs="*", default=[], metavar="WORD", help="only classes with all these words in their names"
    )
    options.add_json(p)
    return p
