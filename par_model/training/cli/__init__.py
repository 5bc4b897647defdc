"""The verbs ``train-tokenizer``, ``encode`` and ``train`` of ``parvis``: their options, and errors as one line.

PyTorch is imported when a verb runs, not for its ``--help``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from par_model.system import explain
from par_model.training.cli import numbers
from par_model.training.files import InputError, text_of
from par_model.words import one_line, printable

LONGEST_ERROR = 2000  # characters
#: What is a value and no option: argparse before Python 3.14 knows one negative number, but neither -1,0,3,3 nor -1e3.
NUMBERS = re.compile(r"-(\.?[0-9]|inf$|nan$)")


class Help(argparse.HelpFormatter):
    """argparse's help, which ends with the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        none = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if not text or none or action.required or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line, as the other verbs of ``parvis`` print them; for scripts of the recipe too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help} | settings)
        self._negative_number_matcher = NUMBERS

    def error(self, message: str) -> NoReturn:
        """Print ``message`` as one line and exit with code 2."""
        message = one_line(message, LONGEST_ERROR)  # argparse repeats an argument of any length
        program = self.prog.partition(" ")[0]  # of "parvis train"
        self.exit(2, f"{program}: error: {message}; '{self.prog} --help' lists the options\n")


def path(argument: str) -> Path:
    """The name of a file or a folder, for argparse. None is empty: Python would take that for the current folder."""
    if not argument:
        raise argparse.ArgumentTypeError("'' is empty; expected the name of a file or folder ('.' is the current one)")
    return Path(argument)


def add_run(p: argparse.ArgumentParser, holds: str, of: str, *, steps: int, batch: int, report: int) -> None:
    """The options that every training has. ``holds``: what its folder does; ``of``: what a batch is made of."""
    p.add_argument("--run", type=path, required=True, help=f"run folder: log.jsonl, checkpoint.pt, {holds}")
    p.add_argument("--resume", action="store_true", help="continue the run in --run")
    p.add_argument("--steps", type=int, default=steps, help="updates of the weights")
    p.add_argument("--batch", type=int, default=batch, help=f"{of} of a step")
    p.add_argument("--seed", type=int, default=0, help=f"of the initial weights and of the order of {of}")
    p.add_argument("--report", type=int, default=report, help="steps between reports and checkpoints")
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end after M minutes, those before a --resume included, or after --steps, whichever comes first; a cosine "
        "follows whichever of the two is further, so it ends at its floor either way",
    )
    add_device(p)


def add_device(p: argparse.ArgumentParser) -> None:
    """The option that says where to compute."""
    p.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:N",
        help="where to compute; auto: the first GPU that PyTorch sees, else the CPU. The files are of the same kind "
        "from either; a GPU rounds in another way, so it gives other weights",
    )


def verb(parser: argparse.ArgumentParser, argv: Sequence[str] | None, module: str, function: str = "train") -> int:
    """Run ``function`` of ``par_model.training.<module>`` with the options of ``parser``; returns the exit code.

    The module is imported only then, as it imports PyTorch.
    """
    args = parser.parse_args(argv)

    def work() -> None:
        numbers.check(args)
        getattr(importlib.import_module(f"par_model.training.{module}"), function)(args)

    return guarded(work)


def words(option: str, text: str) -> list[str]:
    """The words of ``text``, given as ``option``, as a shell cuts it. Raises InputError with the option's name."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r}: {str(error).lower()}; close each quotation in it") from error


def parsed(
    option: str, parser: argparse.ArgumentParser, argv: Sequence[str], limited: bool = True
) -> argparse.Namespace:
    """The options ``argv`` of the verb of ``parser``, which a script was given as the text of ``option``.

    ``limited``: it is a verb of this package, whose numbers have limits here.

    Raises InputError, in one line that begins with ``option``.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            args = parser.parse_args(argv)
        if limited:
            numbers.check(args)
    except SystemExit as ended:
        message = printed.getvalue().strip().removeprefix("parvis: error: ")
        raise InputError(f"{option}: {message or 'expected options, not --help'}") from ended
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    return args


def guarded(work: Callable[[], None]) -> int:
    """Run ``work`` of a verb; returns the exit code: 0, or 2 with one line on stderr for an expected error."""
    from par_model.checkpoint import CheckpointError

    try:
        work()
    except (InputError, CheckpointError, OSError) as error:
        text = explain(error) if isinstance(error, OSError) else text_of(error)
        print(f"parvis: error: {printable(text)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            text in str(error)
            for text in ("allocate memory", "out of memory")  # torch has no class for the CPU's
        ):
            raise
        print("parvis: error: not enough memory; free some, or give a smaller --batch", file=sys.stderr)
        return 2
    return 0
