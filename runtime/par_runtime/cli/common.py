"""What every verb of ``parvis`` uses: the argument parser, errors as one line, and the progress bar.

``parvis --help`` imports this module, so it imports neither numpy nor ONNX Runtime.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from par_runtime.errors import BundleError, CudaError, OutputsError, RequestError
from par_runtime.system import explain

LONGEST_ERROR = 2000  #: characters; argparse repeats an argument of any length
#: What is a value and no option: argparse before Python 3.14 knows one negative number, but neither -1,0,3,3 nor -1e3.
NUMBERS = re.compile(r"-(\.?[0-9]|inf$|nan$)")


class Help(argparse.HelpFormatter):
    """argparse's help, where a text of several lines (an epilog's table) keeps them; any other is wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))


class Parser(argparse.ArgumentParser):
    """argparse, with its errors printed as one line, like every other error of ``parvis``."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._negative_number_matcher = NUMBERS

    def error(self, message: str) -> NoReturn:
        """Print ``message`` as one line and exit with code 2."""
        raise SystemExit(fail(f"{message}; '{self.prog} --help' lists the options"))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does, but a list of values (``--label a b``) may stand before the positional arguments too."""
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_args(_positionals_first(self, given), namespace)


def _positionals_first(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """``arguments`` with those positional ones in front that argparse would take for the end of a list of values.

    A value that is not of the list's type, and is an existing file or folder, is positional: "--batches 1 2 demo".
    So is one value of a list where positional arguments are required and there is no other: the last one that exists,
    else the last one.
    """
    options = {name: action for action in parser._actions for name in action.option_strings}
    lists: list[tuple[int, int]] = []  # where the values of a list begin and end
    moved: list[int] = []
    positionals, i = 0, 0
    while i < len(arguments):
        if arguments[i] == "--":
            positionals += len(arguments) - i - 1
            break
        action = _option(options, arguments[i])
        i += 1
        if action is None:
            positionals += 1
        elif action.nargs == "+" and "=" not in arguments[i - 1]:
            begin = i
            while i < len(arguments) and not _is_option(options, arguments[i]):
                if i > begin and not _is_of(action.type, arguments[i]) and os.path.exists(arguments[i]):
                    break
                i += 1
            lists.append((begin, i))
            while i < len(arguments) and not _is_option(options, arguments[i]):
                moved.append(i)
                i += 1
        elif action.nargs is None and "=" not in arguments[i - 1]:
            i += 1
    required = any(not action.option_strings and action.nargs in (None, "+") for action in parser._actions)
    values = [i for begin, end in lists if end - begin > 1 for i in range(begin, end)]
    if required and positionals + len(moved) == 0 and values:
        moved = [i for i in values if os.path.exists(arguments[i])][-1:] or values[-1:]
    return [arguments[i] for i in moved] + [a for i, a in enumerate(arguments) if i not in moved]


def _option(options: Mapping[str, argparse.Action], argument: str) -> argparse.Action | None:
    """The option that ``argument`` names, also by the beginning of its name; None where it is no option."""
    name = argument.partition("=")[0]
    if name in options:
        return options[name]
    found = [action for option, action in options.items() if name.startswith("--") and option.startswith(name)]
    return found[0] if found else None


def _is_option(options: Mapping[str, argparse.Action], argument: str) -> bool:
    return argument == "--" or argument.startswith("--") or _option(options, argument) is not None


def _is_of(kind: Any, text: str) -> bool:
    """Whether argparse would take ``text`` as a value of the type ``kind``."""
    try:
        kind(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return kind is None
    return True


def unknown_option(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """An error that names the first option that ``parser`` does not have, and a similar one; "" where it has all.

    argparse would complain about what is missing first, which hides that an option was only misspelt.
    """
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for argument in arguments:
        name = argument.partition("=")[0]
        if argument == "--":
            break
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            close = difflib.get_close_matches(name, known, 1, 0.6)
            mean = f"; did you mean {close[0]}?" if close else ""
            return f"unknown option {name[:60]}{mean}; '{parser.prog} --help' lists the options"
    return ""


def fail(error: object, code: int = 2) -> int:
    """Print ``error`` as the one line of a verb that failed; returns ``code``.

    What is too long loses its middle: the beginning says what was given, the end how to fix it.
    """
    text = str(error)
    if len(text) > LONGEST_ERROR:
        text = f"{text[: LONGEST_ERROR // 2]} ... {text[-LONGEST_ERROR // 2 :]}"
    print(f"parvis: error: {printable(text)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """``text`` with what begins another line, or what a terminal obeys, escaped: names of files come from anybody."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def out_of_memory(error: BaseException, advice: str) -> str:
    """What a verb prints where memory ran out; ``advice``: what helps, beside memory."""
    why = " ".join(str(error).split())[:200]
    return f"not enough memory{f' ({why})' if why else ''}; free some, or {advice}"


def guarded(work: Callable[[], int], less: str = "") -> int:
    """Run ``work`` and return its exit code; an expected failure is printed as one line, and gives exit code 2.

    ``less``: what can be given less of where memory runs out.
    """
    try:
        return work()
    except (BundleError, RequestError, CudaError, OutputsError) as error:
        return fail(error)
    except BrokenPipeError:  # of a pipe that a verb opened itself, see dispatch.main
        raise
    except OSError as error:
        return fail(explain(error))
    except MemoryError as error:
        return fail(out_of_memory(error, f"give less at once ({less})" if less else "run it where there is more"))


class Bar:
    """A progress bar on stderr. Nothing is shown where ``silent``, or where stderr is no terminal.

    An instance is the ``on_step`` callback of :meth:`par_runtime.Pipeline.generate`, or, with ``of_bytes``, ``on_load``
    of :meth:`par_runtime.Pipeline.load`.
    """

    def __init__(self, silent: bool, of_bytes: bool = False, unit: str = "call", goes_on: bool = False) -> None:
        """``goes_on``: what the first call says to be done was done by an earlier run, and took no time now."""
        self._bar: Any = None
        self._goes_on = goes_on
        self._unit = {"unit": "B", "unit_scale": True, "desc": "weights"} if of_bytes else {"unit": unit}
        self._silent = silent or not sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` calls (or ``unit``) are made, or bytes read."""
        if self._silent:
            return
        if self._bar is None:
            from tqdm import tqdm  # its import takes 20 ms, so only a terminal pays for it

            self._bar = tqdm(total=total, leave=False, initial=done if self._goes_on else 0, **self._unit)
        self._bar.update(done - self._bar.n)
        if done >= total:  # lines that a verb prints afterwards must not meet a bar
            self._bar.close()
            self._bar = None

    def clear(self) -> None:
        """Take the bar off the terminal, for a line that is printed now; the next call shows it again."""
        if self._bar is not None:
            self._bar.clear()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
