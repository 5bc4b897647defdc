"""Options that several verbs share, each with one name and one help text, and the check of numbers that count."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from par_runtime.dtypes import Rounding
from par_runtime.errors import RequestError


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise RequestError where one of these options is given and below 1. ``names``: as argparse stores them."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


# -- input and output -------------------------------------------------------------------------------------------------


def add_bundle(p: argparse.ArgumentParser) -> None:
    """The positional argument BUNDLE."""
    p.add_argument(
        "bundle", type=path, metavar="BUNDLE", help="folder made by 'parvis export', for instance models/demo"
    )


def add_bundle_option(p: argparse.ArgumentParser, what: str) -> None:
    """``--bundle``, of a verb that takes an image as its positional argument. ``what``: the help text."""
    p.add_argument("--bundle", type=path, required=True, help=what)


def add_out(p: argparse.ArgumentParser, what: str) -> None:
    """``--out``, a PNG. ``what``: the help text."""
    p.add_argument("--out", type=path, help=what)


def add_labels(p: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """``--label``, one or more classes. ``what``: the help text."""
    p.add_argument("--label", type=text, nargs="+", action="extend", required=required, help=what)


def text(argument: str) -> str:
    """A word of the command line, for argparse: UTF-8 also where the system is not set to it."""
    return os.fsencode(argument).decode(errors="surrogateescape")


def path(argument: str) -> Path:
    """The name of a file or a folder, for argparse. None is empty: Python would take that for the current folder."""
    return Path(place(argument))


def place(argument: str) -> str:
    """The same for what may also be a name elsewhere, as on a hub."""
    if not argument:
        raise argparse.ArgumentTypeError("'' is empty; expected the name of a file or folder ('.' is the current one)")
    return argument


class Extend(argparse.Action):
    """Collects the values of a list option: each may be several by commas (a tuple, by its type); numbers ascending."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: object = None) -> None:
        before = getattr(namespace, self.dest)
        merged = dict.fromkeys((*(() if before is self.default else before), *(v for value in values for v in value)))
        setattr(namespace, self.dest, tuple(sorted(merged) if all(isinstance(v, int) for v in merged) else merged))


def add_list(p: argparse._ActionsContainer, name: str, kind: Callable[[str], tuple[Any, ...]], **more: Any) -> None:
    """An option that takes a list: ``--batches 1 2 4``, ``--batches 1,2,4``, or the option repeated.

    ``kind``: the values of one word, as a tuple.
    """
    p.add_argument(name, type=kind, nargs="+", action=Extend, metavar=more.pop("metavar", "X"), **more)


def add_scale(p: argparse.ArgumentParser) -> None:
    """``--scale``, for small images."""
    p.add_argument(
        "--scale",
        type=int,
        default=1,
        metavar="N",
        help="write each pixel as a square of N a side, for small images; 'redo' and 'edit' undo it (default: 1)",
    )


def add_fps(p: argparse.ArgumentParser) -> None:
    """``--fps``, of clips."""
    p.add_argument("--fps", type=float, help="frames per second of a clip's file (default: 8)")


def add_tokens(p: argparse.ArgumentParser) -> None:
    """``--tokens``, an array to write."""
    p.add_argument("--tokens", type=path, help=".npy to write: tokens [B,N] int64 in sequence order")


def add_fit(p: argparse.ArgumentParser) -> None:
    """``--fit``, for images of any shape."""
    p.add_argument(
        "--fit",
        choices=["crop", "stretch"],
        default="crop",
        help="how an image of another shape becomes one of the model's: its largest middle part (default), or "
        "stretched",
    )


# -- sampling ---------------------------------------------------------------------------------------------------------


def add_guidance(p: argparse.ArgumentParser) -> None:
    """``--guidance``, one scale for all images."""
    p.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")


def add_sampling(p: argparse.ArgumentParser) -> None:
    """How tokens are drawn, except for the guidance scale: some verbs take several."""
    p.add_argument(
        "--guidance-interval",
        type=int,
        metavar="I",
        help="guide only the first call, and in each of the two stages (single tokens, groups) calls 0 to I; the later "
        "calls take half the rows; -1 guides every call (default: the bundle's)",
    )
    p.add_argument("--temperature", type=float, help="default: the bundle's")
    p.add_argument("--top-k", type=int, help="keep the k most probable codes, 0 keeps all (default: the bundle's)")
    p.add_argument(
        "--top-p", type=float, help="keep the most probable codes up to this mass, 1 keeps all (default: the bundle's)"
    )
    p.add_argument("--greedy", action="store_true", help="always the most probable code; no noise")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of this part say, for ``Pipeline.generate``."""
    names = ("guidance", "temperature", "top_k", "top_p", "greedy", "guidance_interval")
    return {name: getattr(args, name) for name in names}


# -- where a verb runs, and what it prints ----------------------------------------------------------------------------


def add_common(p: argparse.ArgumentParser, quiet: str = "no progress bar, no text") -> None:
    """Which device a verb runs on, and whether it prints anything; ``quiet``: what ``--quiet`` leaves out."""
    p.add_argument(
        "--device",
        default="auto",
        help="'auto': the bundle's best engine for this GPU (our kernels, or TensorRT), else the CPU (default); 'cpu'; "
        "'cpu-ort': ONNX Runtime there even where the C kernels could run; 'cuda' or 'cuda:1': the best engine for "
        "that GPU; 'cuda-ort': ONNX Runtime on it",
    )
    p.add_argument(
        "--capture",
        choices=["image", "call", "none"],
        default="image",
        help="how a GPU is fed: one graph launch per image (default), one per call, or plain launches",
    )
    add_threads(p)
    add_arithmetic(p)
    add_quiet(p, quiet)


def add_threads(p: argparse.ArgumentParser) -> None:
    """``--threads``."""
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def rounding(args: argparse.Namespace) -> Rounding:
    """What :func:`add_arithmetic` was given."""
    return Rounding(args.arithmetic, args.cache, args.decoder_precision)


def add_arithmetic(p: argparse.ArgumentParser) -> None:
    """``--arithmetic``, ``--cache`` and ``--decoder-precision``, of a CPU."""
    p.add_argument(
        "--arithmetic",
        choices=["auto", "fp32", "bf16", "int8"],
        default="auto",
        help="what a CPU multiplies in: activations are rounded to it, fp32 and fp16 weights to bf16; 'int8' is for "
        "quantised weights (default: 'auto', what 'parvis calibrate' has proven for the bundle, else fp32)",
    )
    p.add_argument(
        "--cache",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="what the C kernels of a CPU keep keys and values in (default: 'auto', as for --arithmetic)",
    )
    add_decoder_precision(p)


def add_decoder_precision(p: argparse.ArgumentParser) -> None:
    """``--decoder-precision``, of a CPU."""
    p.add_argument(
        "--decoder-precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="what the C decoder computes in; 'bf16' takes AMX, or dot products in bf16 on AMD's CPUs, without which "
        "it stays in fp32 (default: 'auto', what 'parvis calibrate' has proven for the bundle, else fp32)",
    )


def add_quiet(p: argparse.ArgumentParser, what: str) -> None:
    """``--quiet``. ``what``: the help text, which states what is left out."""
    p.add_argument("--quiet", action="store_true", help=what)


def add_no_selftest(p: argparse.ArgumentParser) -> None:
    """``--no-selftest``."""
    p.add_argument("--no-selftest", action="store_true", help="do not check the bundle's test tokens first")


def add_json(p: argparse.ArgumentParser, instead_of: str = "text") -> None:
    """``--json``. ``instead_of``: what the verb prints without it."""
    p.add_argument("--json", action="store_true", help=f"print one JSON object instead of {instead_of}")
