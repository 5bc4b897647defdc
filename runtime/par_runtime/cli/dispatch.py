"""The command ``parvis``: one module per verb, imported when its verb runs, by name.

Verbs that need torch or onnx lie in packages of their own, which the runtime never imports itself.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from par_runtime import __version__
from par_runtime.cli.common import Help, Parser, fail, printable, unknown_option
from par_runtime.cli.streams import steady
from par_runtime.errors import how_to_install
from par_runtime.stopping import exit_on_signals, later

#: extras, as pip takes them -> the packages that they bring, of those that a verb can miss.
EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "cpu,export": ("torch", "onnx", "safetensors", "huggingface_hub", "par_export", "par_model"),
    "cpu,calibrate": ("torch", "onnx", "par_export", "par_model", "par_calibration"),
    "cpu,evaluate": ("onnx", "par_calibration"),
    "completion": ("shtab",),
    "cpu,serve": ("starlette", "uvicorn", "prometheus_client"),
    "build,tensorrt-rtx": ("onnx", "ml_dtypes", "par_export"),
}


VERSION = f"parvis {__version__}"


class Verb(NamedTuple):
    """A verb of ``parvis``."""

    module: str  #: with ``main(argv) -> exit code``
    does: str  #: for ``parvis --help``
    extras: tuple[str, ...] = (
        "cpu",
    )  #: keys of EXTRAS that bring its packages; the first that brings a package is named


VERBS = {
    "generate": Verb("par_runtime.cli.generate", "make images or clips from a bundle"),
    "redo": Verb("par_runtime.cli.redo", "make a PNG or a clip again from its own metadata, and compare"),
    "reconstruct": Verb("par_runtime.cli.reconstruct", "encode images or clips to tokens and decode them again"),
    "edit": Verb("par_runtime.cli.edit", "make a part of an image or a clip anew and keep the rest"),
    "sample": Verb("par_runtime.cli.sample", "make the images of an evaluation (FID), as one .npz"),
    "evaluate": Verb(
        "par_calibration.cli.evaluate",
        "compare bundles with real images: likelihood, distance, settings",
        ("cpu", "cpu,evaluate", "cpu,export"),  # the last for clips in the trainers' raw form
    ),
    "serve": Verb(
        "par_runtime.cli.serve", "answer requests for images over HTTP, many users at once", ("cpu", "cpu,serve")
    ),
    "bench": Verb(
        "par_runtime.cli.bench",
        "measure: phases, baselines, the hardware's limit, the paper's tables",
        ("cpu", "cpu,export"),
    ),
    "inspect": Verb(
        "par_runtime.cli.inspect",
        "describe a bundle or checkpoint: what it is, needs, and could reach",
        ("cpu", "cpu,export"),
    ),
    "labels": Verb("par_runtime.cli.labels", "list the classes of a bundle, or search them"),
    "doctor": Verb("par_runtime.cli.doctor", "what runs on this machine, what does not, and what to install"),
    "completion": Verb(
        "par_runtime.cli.completion", "a script for your shell, which completes all this", ("completion",)
    ),
    "verify": Verb("par_runtime.cli.verify", "compare two backends on a bundle: logits, tokens, images"),
    "export": Verb(
        "par_export.cli.export", "turn a checkpoint into a bundle, checked against PyTorch", ("cpu", "cpu,export")
    ),
    "build": Verb(
        "par_export.cli.build",
        "build engines from a bundle, TensorRT plans or kernels, with or without a GPU",
        ("build,tensorrt-rtx", "cpu", "cpu,export"),
    ),
    "tune": Verb(
        "par_export.cli.tune",
        "find the fastest form of an engine on this GPU",
        ("build,tensorrt-rtx", "cpu", "cpu,export"),
    ),
    "calibrate": Verb(
        "par_calibration.cli.calibrate",
        "make weights smaller (int8, int4), with the proof that images do not suffer",
        ("cpu", "cpu,calibrate"),
    ),
    "train-tokenizer": Verb(
        "par_model.training.cli.tokenizer", "train a VQ tokenizer on a folder of images", ("cpu", "cpu,export")
    ),
    "train-video-tokenizer": Verb(
        "par_model.training.cli.video_tokenizer", "train a video tokenizer on raw clips", ("cpu", "cpu,export")
    ),
    "encode": Verb(
        "par_model.training.cli.encode", "turn a folder of images or clips into token ids", ("cpu", "cpu,export")
    ),
    "train": Verb("par_model.training.cli.transformer", "train a PAR model on token ids", ("cpu", "cpu,export")),
}

#: What others have as verbs, and where it is here.
ELSEWHERE = {
    "score": "'parvis evaluate' scores held-out images, and Pipeline.score any, in Python (README)",
    "decode": "tokens become images in Python, by Pipeline.decode (README); 'parvis reconstruct' takes pictures",
    "quantize": "'parvis calibrate' makes weights smaller, with the proof that images do not suffer",
    "fid": "'parvis sample' makes the images that an FID takes (docs/evaluation.md)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    0 done, 1 compared and different, 2 bad input or text that could not be printed, 130 or 143 stopped.
    """
    with steady() as lost, _warnings_on_one_line():
        code = _run(list(sys.argv[1:] if argv is None else argv))
        why = lost()
        if why:
            return fail(f"what was printed is not complete ({why} on standard output); files are not affected")
        return code


def _run(arguments: list[str]) -> int:
    """Run one verb; every way in which it ends becomes an exit code."""
    try:
        with exit_on_signals():
            if arguments[:1] == ["help"]:  # 'parvis help' and 'parvis help VERB', as other programs have them
                arguments = [*arguments[1:2], "--help"]
            verb = _verb(arguments)
            if "--version" in arguments:
                print(VERSION)
                return 0
            return _call(verb, arguments[1:])
    except SystemExit as stop:  # of argparse, and of a signal
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _stopped()
    except ImportError as error:  # an extension module turns Ctrl-C or a signal during its import into this
        behind = _stop_behind(error)
        if behind is None:
            raise
        return _stopped() if isinstance(behind, KeyboardInterrupt) else int(behind.code or 0)
    except BrokenPipeError:  # of a pipe that a verb opened itself: its reader has stopped reading
        return 0


@contextmanager
def _warnings_on_one_line() -> Iterator[None]:
    """Print a warning of a library as the errors are: one line, without the place in its sources, each once."""
    printed: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        line = f"parvis: warning: {printable(' '.join(str(message).split()))}"
        if line not in printed:
            printed.add(line)
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _stopped() -> int:
    print("\nparvis: stopped; nothing was half-written", file=sys.stderr)
    return 130


def _stop_behind(error: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """What stopped the command, where ``error`` comes of it."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__cause__ or error.__context__
    return error


def _verb(arguments: list[str]) -> str:
    """The verb, or an exit: help, version, or an error that names a similar verb."""
    if arguments and arguments[0] in VERBS:
        return arguments[0]
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
        raise SystemExit(fail(f"options come after the verb: parvis VERB {arguments[0][:40]} ...; see 'parvis --help'"))
    parser = Parser(
        prog="parvis",
        description="Run PAR models: parallelized autoregressive visual generation.",
        formatter_class=Help,
        epilog="verbs:\n"
        + "\n".join(f"  {name:{max(map(len, VERBS))}}  {verb.does}" for name, verb in VERBS.items())
        + "\n\n'parvis VERB --help' lists the options of a verb. docs/install.md lists the extras that they need.",
    )
    parser.add_argument("--version", action="version", version=VERSION)
    parser.add_argument("verb", metavar="VERB", help="what to do, see below")
    if not arguments:
        parser.print_help()
        raise SystemExit(2)
    word = parser.parse_args(arguments[:1]).verb
    if word in ELSEWHERE:
        raise SystemExit(fail(f"unknown verb {word!r}: {ELSEWHERE[word]}"))
    begin = [verb for verb in VERBS if word and verb.startswith(word)]
    close = begin or _close(word)
    mean = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise SystemExit(fail(f"unknown verb {word[:40]!r}; {mean}'parvis --help' lists the verbs"))


def _close(word: str) -> list[str]:
    """The verbs that ``word`` may be a misspelling of: the most similar one, and another that is nearly as similar."""
    found = difflib.get_close_matches(word, VERBS, 2, 0.5)
    alike = [difflib.SequenceMatcher(None, verb, word).ratio() for verb in found]
    return [verb for verb, ratio in zip(found, alike, strict=True) if ratio > alike[0] - 0.1]


def _folder_is_gone() -> bool:
    """Whether there is no current folder. Python cannot start another process there, and torch ends this one."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _call(verb: str, arguments: list[str]) -> int:
    """Run a verb; a package that is missing is reported as one line with the command that installs it."""
    if {"cpu,export", "cpu,calibrate"} & set(VERBS[verb].extras) and _folder_is_gone():
        return fail(f"the current folder was removed, where 'parvis {verb}' cannot run; change to another one (cd)")
    try:
        with later():
            module = importlib.import_module(VERBS[verb].module)
        unknown = unknown_option(module.parser(), arguments)
        return fail(unknown) if unknown else int(module.main(arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra in VERBS[verb].extras if missing in EXTRAS[extra]), None)
        if extra is None:
            raise
        return fail(f"'parvis {verb}' needs {missing}, which is not installed; {how_to_install(extra)}")


if __name__ == "__main__":
    raise SystemExit(main())
