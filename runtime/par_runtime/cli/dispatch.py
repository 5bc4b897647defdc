"""The command ``parvis``: one parser per verb; verbs that need torch live in their own packages, found by name."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from par_runtime import __version__

#: verb -> (module, what it does). Their packages are optional extras: the runtime never imports them itself.
ELSEWHERE = {
    "export": ("par_export.cli.export", "turn a checkpoint into a bundle, checked against PyTorch"),
    "build": ("par_export.cli.build", "build TensorRT plans from a bundle, with or without a GPU"),
    "tune": ("par_export.cli.tune", "find the fastest form of an engine on this GPU"),
    "train-tokenizer": ("par_model.training.tokenizer", "train a VQ tokenizer on a folder of images"),
    "encode": ("par_model.training.encode", "turn a folder of images into token ids"),
    "train": ("par_model.training.transformer", "train a PAR model on token ids"),
}
HERE = {
    "generate": ("par_runtime.cli.generate", "make images from a bundle"),
    "redo": ("par_runtime.cli.generate", "make a PNG again from what it says of itself, and compare"),
    "reconstruct": ("par_runtime.cli.edit", "encode images to tokens and decode them again"),
    "edit": ("par_runtime.cli.edit", "make a part of an image anew and keep the rest"),
    "bench": ("par_runtime.cli.bench", "measure: phases, baselines, the hardware's limit, the paper's tables"),
    "inspect": ("par_runtime.cli.inspect", "say what a bundle or checkpoint is, needs, and could reach"),
    "verify": ("par_runtime.cli.verify", "compare two backends on a bundle: logits, tokens, images"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors as the one line that every other error of ``parvis`` is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"parvis: error: {message}; '{self.prog} --help' tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 compared and different, 2 bad input, 130 or 143 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminated_in_order():
            verb = _verb(arguments)
            if verb in HERE:
                return _call(HERE[verb][0], verb, verb, arguments[1:])
            return _call(ELSEWHERE[verb][0], "main", verb, arguments[1:])
    except KeyboardInterrupt:
        print("\nparvis: stopped; nothing was half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM (and SIGHUP, of a terminal that closes) unwind the stack, as Ctrl-C does, so that files begun are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    ends = [each for each in ends if signal.getsignal(each) is not signal.SIG_IGN]  # nohup means it
    previous = [signal.signal(each, lambda number, _: sys.exit(128 + number)) for each in ends]
    try:
        yield
    finally:
        for each, handler in zip(ends, previous, strict=True):
            signal.signal(each, handler)


def _verb(arguments: list[str]) -> str:
    """The verb, or an exit through argparse: help, version, or an error that lists the verbs."""
    verbs = {**HERE, **ELSEWHERE}
    if arguments and arguments[0] in verbs:
        return arguments[0]
    parser = Parser(
        prog="parvis",
        description="Run PAR models: parallelized autoregressive visual generation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + "\n".join(f"  {name:16} {does}" for name, (_, does) in verbs.items())
        + "\n\n'parvis VERB --help' tells the options of a verb. docs/install.md says which extras they need.",
    )
    parser.add_argument("--version", action="version", version=f"parvis {__version__}")
    parser.add_argument("verb", choices=list(verbs), metavar="VERB", help="what to do, see below")
    if not arguments:
        parser.print_help()
        raise SystemExit(2)
    parser.parse_args(arguments[:1])
    raise AssertionError("argparse accepts only the verbs")


#: What a missing package is part of; for a verb, where several extras bring it.
EXTRA = {
    "onnxruntime": "cpu",
    "torch": "cpu,export",
    "onnx": "cpu,export",
    "safetensors": "cpu,export",
    "huggingface_hub": "cpu,export",
    "par_export": "cpu,export",
    "par_model": "cpu,export",
}
BUILD_EXTRA = dict.fromkeys(("onnx", "ml_dtypes", "par_export"), "build,tensorrt-rtx")


def _call(module: str, function: str, verb: str, arguments: list[str]) -> int:
    """Run a verb; a package that is missing becomes one line that says which extra brings it."""
    try:
        return int(getattr(importlib.import_module(module), function)(arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = (EXTRA | (BUILD_EXTRA if verb in ("build", "tune") else {})).get(missing)
        if extra is None:
            raise
        print(
            f"parvis: error: 'parvis {verb}' needs {missing}, which is not installed; pip install 'parvis[{extra}]' (in a "
            f"clone: pip install '.[{extra}]'); docs/install.md says which to take",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
