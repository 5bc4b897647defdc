"""``parvis build``: a bundle becomes TensorRT plans, or an engine of kernels."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from par_export.cli.common import ENGINES, check_kernels, count, counts, guarded, needed_for_kernels, precision
from par_export.engines.cache import DEFAULT_LIMIT_BYTES
from par_export.engines.request import MODES, MOST_IMAGES, NAME_A_TARGET, BuildRequest, check_local_gpu, sizes_up_to
from par_export.errors import BuildError
from par_export.kernels import request as kernels
from par_runtime.backends.engines import ENGINE_JSON
from par_runtime.backends.tails import TAILS, TOPK_LIMIT
from par_runtime.checked import shown
from par_runtime.cli.common import Parser
from par_runtime.cli.options import add_list, path
from par_runtime.dtypes import PRECISIONS
from par_runtime.system import cache_folder, check_different, check_writable, write_beside


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``parvis build``; returns the exit code."""
    args = parser().parse_args(argv)
    advice = "give another place with --out DIR or PARVIS_ENGINE_DIR"
    return guarded(lambda: run(args), no_permission=advice)


def run(args: argparse.Namespace) -> int:
    """Build an engine per target and print the reports.

    Raises what :func:`par_export.engines.build.build` and :func:`par_export.kernels.build.build_kernels` raise.
    """
    if args.engine == "kernels":
        check_kernels(args)
    if "local" in args.target:  # before the import, which may ask to install TensorRT
        check_local_gpu(otherwise=kernels.NAME_A_TARGET if args.engine == "kernels" else NAME_A_TARGET)
    if args.list is not None and not args.list.parent.is_dir():
        raise BuildError(f"--list {args.list}: no folder {args.list.parent}; give a file in one that exists")
    if args.list is not None:
        check_different([args.list, *([args.out / "engine"] if args.out else [])])
        check_writable(args.list)
    folders = _kernels(args) if args.engine == "kernels" else _plans(args)
    if args.list is not None:
        write_beside(args.list, lambda part: part.write_text(json.dumps([str(folder) for folder in folders])))
    if args.json:
        for folder in folders:
            print(json.dumps({"engine": str(folder), **json.loads((folder / ENGINE_JSON).read_text())}))
    elif args.kernels:
        for folder in folders:
            _print_kernels(json.loads((folder / ENGINE_JSON).read_text()))
    return 0


def _plans(args: argparse.Namespace) -> list[Path]:
    from par_export.engines.build import build, tensorrt_for

    for target in args.target[1:]:  # before the first is built
        tensorrt_for(target)
    folders = []
    for target in args.target:
        with PlanBar(args.quiet or args.json) as bar:
            folders.append(build(_request(args, target), (lambda _: None) if args.json or args.quiet else bar.say, bar))
    return folders


def _kernels(args: argparse.Namespace) -> list[Path]:
    with needed_for_kernels():
        from par_export.kernels.build import build_kernels

    request = kernels.KernelsRequest(
        bundle=args.bundle,
        targets=args.target,
        precision=args.precision,
        images=args.images or sizes_up_to(args.max_images or MOST_IMAGES),
        decoder_precision=args.decoder_precision,
        out=args.out,
        **_cache(args),
    )
    with PlanBar(args.quiet or args.json) as bar:
        return build_kernels(request, (lambda _: None) if args.json or args.quiet else bar.say, bar)


def _cache(args: argparse.Namespace) -> dict[str, Any]:
    """What a request says of the cache of engines. Raises BuildError."""
    given = [f"--{name.replace('_', '-')}" for name in ("cache_dir", "cache_gb") if getattr(args, name) is not None]
    if args.no_cache and given:
        raise BuildError(f"{' and '.join(given)}: --no-cache uses no cache; leave one of the two out")
    return {
        "use_cache": not args.no_cache,
        "cache_folder": args.cache_dir or cache_folder(),
        "cache_limit_bytes": DEFAULT_LIMIT_BYTES if args.cache_gb is None else int(args.cache_gb * 1e9),
    }


def _request(args: argparse.Namespace, target: str) -> BuildRequest:
    return BuildRequest(
        bundle=args.bundle,
        target=target,
        precision=args.precision,
        images=args.images or sizes_up_to(args.max_images or MOST_IMAGES),
        mode=args.engines or MODES[0],
        sampling=args.sampling,
        grouped=None if args.attention is None else args.attention == "grouped",
        lengths=None if args.visible is None else args.visible == "lengths",
        norm_after=args.norm == "after",
        decoder_precision=args.decoder_precision or "fp32",
        out=args.out,
        **_cache(args),
        reproducible=args.reproducible,
    )


def _print_kernels(entry: dict[str, Any]) -> None:
    if "kernels" in entry:
        from par_export.kernels.report import listing

        print("\n".join(listing(entry)))
        return
    for name, plan in entry["report"]["plans"].items():
        for profile in plan["profiles"][:1]:
            print(f"\n{name}, {profile['images']} images: {profile['total']} kernels")
            for i, kernel in enumerate(profile["names"]):
                print(f"  {i:4} {kernel}")


class PlanBar:
    """The builder's progress on stderr, one bar per plan; silent if ``silent``, or if stderr is no terminal."""

    def __init__(self, silent: bool) -> None:
        self._silent = silent or not sys.stderr.isatty()
        self._bar: Any = None
        self._plan = ""

    def __enter__(self) -> PlanBar:
        return self

    def __call__(self, phase: str, fraction: float) -> None:
        if self._silent:
            return
        plan = phase.partition(":")[0]
        if plan != self._plan:
            from tqdm import tqdm

            self._close()
            self._plan = plan
            self._bar = tqdm(total=100, leave=False, bar_format="{desc:44} {percentage:3.0f} %|{bar}| {elapsed}")
        self._bar.set_description_str(phase[:44], refresh=False)
        self._bar.update(100 * fraction - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line of text where the bar was."""
        self._close()
        print(line, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._plan = None, ""

    def __exit__(self, *_: object) -> None:
        self._close()


def gigabytes(text: str) -> float:
    """A number from 0 on, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected gigabytes, 0 or more")
    return value


def targets(text: str) -> tuple[str, ...]:
    """Names of GPUs to build for, separated by commas, for argparse: "SM80" and the like, or "local"."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name != "local" and not re.fullmatch("SM[1-9][0-9]{1,2}", name, re.ASCII | re.IGNORECASE):
            raise argparse.ArgumentTypeError(
                f"{shown(name)}: expected SM and a compute capability (SM80 is an A100, SM89 an L4 or RTX 4090), "
                "or local"
            )
    if not names:
        raise argparse.ArgumentTypeError("expected at least one target, for instance SM80")
    return tuple(dict.fromkeys(name if name == "local" else name.upper() for name in names))


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis build``."""
    p = Parser(
        prog="parvis build",
        description="Build engines from a bundle, into its folder engines/ if it can be written: plans of TensorRT, or "
        "kernels of our own, which need nothing but the driver to run. Kernels and the plans of TensorRT-RTX need no "
        "GPU to be built: name the GPU to build for. Ends with a report: launches per step, bytes, what was fused.",
    )
    p.add_argument(
        "bundle", type=path, metavar="BUNDLE", help="folder made by 'parvis export', for instance models/demo"
    )
    p.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="'tensorrt': plans (default); 'kernels': our own, for SM80, SM86, SM89, SM90, SM100, SM120, compiled by "
        "Triton: docs/kernels.md",
    )
    add_list(
        p,
        "--target",
        targets,
        required=True,
        metavar="TARGET",
        help="SM80 (A100), SM89 (L4, RTX 4090), SM90 (H100, H200), ... one or several; 'local' is this machine's GPU",
    )
    p.add_argument(
        "--precision",
        type=precision,
        choices=PRECISIONS,
        help="what the step network computes in (default: the bundle's precision); kernels: fp16 or bf16, also where "
        "weights are int8 or int4",
    )
    sizes = p.add_mutually_exclusive_group()
    sizes.add_argument(
        "--max-images",
        type=count,
        help="largest batch; engines are built for 1, 2, 4, ... up to it (default: 8)",
    )
    add_list(sizes, "--images", counts, help="batch sizes to build for: 1 2 4, instead of --max-images")
    p.add_argument(
        "--engines",
        choices=MODES,
        help="plans: 'shared': one serves every phase, weights once (default); 'per-phase': a plan for each",
    )
    p.add_argument(
        "--sampling",
        choices=TAILS,
        help="plans: sampling tail (default: the bundle's, or exact where its own settings need it): 'plain' draws "
        f"from the whole codebook or greedily, 'topk' adds top-k up to {TOPK_LIMIT} and top-p within it, 'exact' has "
        "no limit and takes more kernels",
    )
    p.add_argument(
        "--attention",
        choices=["grouped", "plain"],
        help="plans: the queries of a group as query heads, or as a sequence (default: grouped up to n = 4)",
    )
    p.add_argument(
        "--visible",
        choices=["lengths", "mask"],
        help="plans: what attention sees: a count per row, or a mask (default: lengths where TensorRT has them)",
    )
    p.add_argument(
        "--norm",
        choices=["before", "after"],
        help="plans: apply a norm before the product that follows, or to it: one kernel less per layer, other rounding "
        "(default: before)",
    )
    p.add_argument(
        "--decoder-precision",
        type=precision,
        choices=PRECISIONS,
        help="default for plans: fp32, which uses TF32 where faster; for kernels: fp16 where the export checked it, "
        "else fp32 with TF32",
    )
    p.add_argument("--kernels", action="store_true", help="also list every kernel or launch of a step")
    p.add_argument("--json", action="store_true", help="print engine.json instead of text")
    p.add_argument(
        "--list", type=path, metavar="FILE", help="also write the engines' folders there, as JSON, at the end"
    )
    p.add_argument("--quiet", action="store_true", help="no progress, no text")
    p.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="put the engine there, not into the bundle; PARVIS_ENGINE_DIR=DIR then finds it (default: that variable's "
        "folder, else the bundle, else the user's cache folder, where engines are always found)",
    )
    p.add_argument("--no-cache", action="store_true", help="neither take the engine from the cache nor keep it there")
    p.add_argument("--cache-dir", type=path, help="default: PARVIS_CACHE, or parvis in the user's cache folder")
    p.add_argument("--cache-gb", type=gigabytes, help=f"bound of the cache (default: {DEFAULT_LIMIT_BYTES / 1e9:g})")
    p.add_argument(
        "--reproducible",
        action="store_true",
        help="classic TensorRT: fail where a kernel was not timed before, so that the plan is the same again",
    )
    return p


if __name__ == "__main__":
    raise SystemExit(main())
