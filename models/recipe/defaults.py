"""Give a bundle other sampling settings, those of requests that say none.

    python defaults.py ../demo ../demo-n1 ../demo-n16 --top-p 0.7

``parvis evaluate`` shows which ones are good. What is not given stays as it is. Only the manifest changes, and with it
the hash of the bundle: an engine that was built from it must be built again, and ``parvis redo`` of an older picture
needs the older bundle. Where one of the bundles cannot be changed, none is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from script import run

from par_model.system import naming
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, followed, written_together
from par_model.words import printable
from par_runtime.backends.tails import why_not_drawn
from par_runtime.bundle import MANIFEST, Bundle, Defaults, seal
from par_runtime.errors import BundleError

LIMITS = {
    "guidance": Limit(0, 1000),
    "temperature": Limit(0, 100, above=True),
    "top_k": Limit(0, 2**31 - 1),
    "top_p": Limit(0, 1, above=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Give bundles other sampling settings.")
    p.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="folders of bundles")
    p.add_argument("--guidance", type=float)
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-k", type=int, help="0: all codes")
    p.add_argument("--top-p", type=float, help="1: all codes")
    args = p.parse_args(argv)

    def work() -> int:
        numbers.check(args, LIMITS)
        given = {name: value for name in LIMITS if (value := getattr(args, name)) is not None}
        if not given:
            raise InputError("no setting is given; give one or more of --guidance, --temperature, --top-k, --top-p")
        bundles = [Bundle.open(path) for path in {followed(path): path for path in args.bundles}.values()]
        for bundle in bundles:
            check(bundle, Defaults(**asdict(bundle.defaults) | given))
        change(bundles, given)
        for bundle in bundles:
            after = Bundle.open(bundle.path).defaults
            print(printable(f"{bundle.path}: {described(bundle.defaults)} -> {described(after)}"))
        return 0

    return run("defaults.py", work, BundleError)


def check(bundle: Bundle, defaults: Defaults) -> None:
    """Raise InputError where the graphs of ``bundle`` do not draw with ``defaults``."""
    for name, graph in bundle.graphs.items():
        if graph.sampling is not None:
            why = why_not_drawn(graph.sampling, bundle.vocab_size, defaults.top_k, defaults.top_p)
            if why is not None:
                raise InputError(
                    f"{bundle.path}: its graph {name!r} {why}; give such settings, or export the bundle anew with these"
                )


def change(bundles: Sequence[Bundle], given: dict[str, Any]) -> None:
    """Write the settings ``given`` into the manifests of ``bundles``, with their new hashes: into all, or into none.

    Raises OSError.
    """
    manifests = [bundle.path / MANIFEST for bundle in bundles]
    with written_together(*manifests) as parts:
        for manifest, part in zip(manifests, parts, strict=True):
            with naming(manifest):
                entries = json.loads(manifest.read_text(encoding="utf-8"))
            sealed = seal(entries | {"defaults": entries["defaults"] | given})
            with naming(part):
                part.write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def described(d: Defaults) -> str:
    """Settings as a line says them."""
    return f"guidance {d.guidance:g}, temperature {d.temperature:g}, top-k {d.top_k}, top-p {d.top_p:g}"


if __name__ == "__main__":
    sys.exit(main())
