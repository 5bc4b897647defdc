"""``parvis completion``: a script that completes verbs, options and files in a shell. It is printed, not run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from par_runtime.cli.common import Help, Parser, guarded

SHELLS = ("bash", "zsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; exit code 0."""
    args = parser().parse_args(argv)
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Print the script for the shell."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """The script, made from the parser of every verb, so that it knows all that this version of parvis takes."""
    import shtab

    from par_runtime.cli.dispatch import VERBS

    root = argparse.ArgumentParser(prog="parvis")
    root.add_argument("--version", action="version", version="")
    verbs = root.add_subparsers(dest="verb")
    for name, verb in VERBS.items():
        own = importlib.import_module(verb.module).parser()
        for action in own._actions:
            if getattr(action.type, "__name__", "") in ("path", "place"):  # par_model has its own
                action.complete = shtab.FILE
        verbs.add_parser(name, help=verb.does, parents=[own], add_help=False)
    return str(shtab.complete(root, shell))


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis completion``."""
    p = Parser(
        prog="parvis completion",
        description="Print a script that lets a shell complete the verbs and options of parvis, and file names.",
        formatter_class=Help,
        epilog="bash:  parvis completion bash > ~/.local/share/bash-completion/completions/parvis\n"
        "zsh:   parvis completion zsh > FOLDER/_parvis, where FOLDER is one of $fpath",
    )
    p.add_argument("shell", choices=SHELLS, help="the shell that the script is for")
    return p
