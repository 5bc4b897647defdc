"""``parvis tune``: the fastest form of an engine on this GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from par_export.cli.common import ENGINES, check_kernels, count, counts, guarded, needed_for_kernels, precision, times
from par_export.engines.request import MODES, MOST_IMAGES, BuildRequest, check_local_gpu, sizes_up_to
from par_export.kernels.request import KernelsRequest
from par_runtime.backends.engines import ENGINE_JSON
from par_runtime.cli.common import Parser
from par_runtime.cli.options import add_list, path
from par_runtime.dtypes import PRECISIONS

ADVICE = "give another place with --out DIR or PARVIS_ENGINE_DIR"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``parvis tune``; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args), stopped="the bundle's engines are as they were", no_permission=ADVICE)


def run(args: argparse.Namespace) -> int:
    """Tune, and print the measurements or one JSON object.

    Raises what :func:`par_export.engines.tune.tune` and :func:`par_export.kernels.tune.tune_kernels` raise.
    """
    if args.engine == "kernels":
        check_kernels(args)
    check_local_gpu(args.gpu, "tuning")  # before the import, which may ask to install TensorRT
    images = args.sizes or sizes_up_to(args.max_images or MOST_IMAGES)
    how: dict[str, Any] = {"images": args.images, "repeats": args.repeats, "rounds": args.rounds, "index": args.gpu}
    how["say"] = (lambda _: None) if args.json else lambda line: print(line, flush=True)
    if args.engine == "kernels":
        with needed_for_kernels():
            from par_export.kernels.tune import tune_kernels
        folder = tune_kernels(
            KernelsRequest(args.bundle, ("local",), precision=args.precision, images=images, out=args.out), **how
        )
    else:
        from par_export.engines.tune import tune

        request = BuildRequest(
            args.bundle,
            "local",
            precision=args.precision,
            images=images,
            mode=args.engines or MODES[0],
            out=args.out,
        )
        folder = tune(request, **how)
    if args.json:
        print(json.dumps({"engine": str(folder), **json.loads((folder / ENGINE_JSON).read_text())["tuned"]}))
    else:
        print(f"{folder}: kept; 'parvis generate' takes it from now on")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis tune``."""
    p = Parser(
        prog="parvis tune",
        description="Build the engine of a bundle for this machine's GPU in every form, time whole images with each in "
        "every capture mode, and keep the fastest. For kernels, shapes of tiles are tried kind by kind. Needs the GPU.",
    )
    p.add_argument("bundle", type=path, metavar="BUNDLE", help="folder made by 'parvis export'")
    p.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="as in 'parvis build' (default: tensorrt)")
    p.add_argument("--images", type=count, default=1, help="batch size to be fastest at (default: 1)")
    sizes = p.add_mutually_exclusive_group()
    sizes.add_argument("--max-images", type=count, help="largest batch to build for (default: 8)")
    add_list(sizes, "--sizes", counts, help="batch sizes to build for: 1 2 4, instead of --max-images")
    p.add_argument("--precision", type=precision, choices=PRECISIONS, help="default: the bundle's")
    p.add_argument("--engines", choices=MODES, help="plans: as in 'parvis build' (default: shared)")
    p.add_argument("--repeats", type=times, default=5, help="timed batches per candidate and round (default: 5)")
    p.add_argument("--rounds", type=times, default=2, help="how often each candidate is timed (default: 2)")
    p.add_argument("--gpu", type=int, default=0, help="number of the GPU (default: 0)")
    p.add_argument("--out", type=path, metavar="DIR", help="put the engine there, as in 'parvis build'")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
