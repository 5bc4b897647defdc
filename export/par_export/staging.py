"""A folder that appears whole or not at all: it is written beside its place under a hidden name, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from par_export.errors import OutputError
from par_runtime.backends.engines import ENGINE_JSON, ENGINES
from par_runtime.bundle import HELDOUT, MANIFEST, WEIGHTS
from par_runtime.checked import shown_path
from par_runtime.stopping import exit_on_signals
from par_runtime.system import NO_ROOM


class Kind(NamedTuple):
    """A kind of folder that is replaced."""

    name: str
    has: tuple[str, ...]  #: files that tell it from other folders
    holds: tuple[str, ...]  #: patterns of the names of all that it holds


HIDDEN = (".*.part*", ".*.old-*", ".DS_Store")  #: what a killed process left, and where macOS keeps how a folder looks
BUNDLE = Kind("a bundle", (MANIFEST, WEIGHTS), (MANIFEST, WEIGHTS, HELDOUT, "*.onnx", ENGINES, *HIDDEN))
ENGINE = Kind("an engine", (ENGINE_JSON,), ("*.json", "*.plan", "*.cubin", "*.data", "*.cache", *HIDDEN))


def check_place(out: Path) -> None:
    """Raise OutputError where ``out``, the name of a new bundle, names no folder, or one inside a bundle: that holds
    nothing else, so that it can be replaced as a whole.
    """
    if out.name in ("", ".."):
        raise OutputError(f"--out {shown_path(out)}: names no new folder; give the name of one")
    for folder in Path(os.path.realpath(out)).parents:
        if all((folder / name).is_file() for name in BUNDLE.has):
            raise OutputError(f"--out {shown_path(out)}: lies in the bundle {shown_path(folder)}; give another folder")


@contextmanager
def staging(out: Path, force: bool, kind: Kind = BUNDLE) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``, which is renamed to ``out`` at the end; on an error it is removed.

    ``force`` replaces a folder at ``out`` that is of ``kind`` and holds nothing else; a link to it stays, and leads to
    the new one. Hidden folders of killed processes are removed. Raises OutputError, OSError.
    """
    if kind is BUNDLE:
        check_place(out)
    out = out.absolute()
    if force and out.is_symlink() and out.is_dir():
        out = Path(os.path.realpath(out))
    for old in _leftovers(out, "old"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # a process was killed between the two renames of _replace: the folder that it was replacing goes back
            os.rename(old, out)
    if os.path.lexists(out):
        check_replaced(out, force, kind)
    for stale in _leftovers(out, "part"):
        shutil.rmtree(stale, ignore_errors=True)
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    with exit_on_signals(), no_empty_folders(out.parent):
        try:
            _make(part)
            yield part
            if os.path.lexists(out):
                if not force or why_not_replaced(out, kind):
                    raise OutputError(f"{out} was made by another command meanwhile and is kept; give another --out")
                _replace(out, part)
            else:
                os.rename(part, out)
        except OSError as error:  # the caller knows ``out``, not the hidden folder
            if isinstance(error.filename, str) and error.filename.startswith(str(part)):
                error.filename, error.filename2 = str(out) + error.filename.removeprefix(str(part)), None
            elif error.filename is None and error.errno in NO_ROOM:
                error.filename = str(out)
            raise
        finally:
            if part.is_symlink():  # it was at ``out``
                part.unlink()
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Remove at the end what came meanwhile of ``folder`` and the folders above it, where it is empty: a failure leaves
    none behind.
    """
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):  # it is not empty, or was not made
                each.rmdir()


def _make(folder: Path) -> None:
    """Make ``folder`` and those above it, of which another command that fails may remove one that it made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except (FileNotFoundError, FileExistsError):
        folder.mkdir(parents=True)


def check_replaced(out: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Raise OutputError where ``out``, which exists, must stay: without ``force``, or where it is not of ``kind``."""
    if not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    why = why_not_replaced(out, kind)
    if why:
        raise OutputError(f"{out} exists and {why}; only {kind.name} is replaced, as a whole: move it away")


def why_not_replaced(out: Path, kind: Kind) -> str:
    """Why ``out`` is no folder of ``kind``, or what would be lost with it; "" where it can be replaced."""
    missing = [name for name in kind.has if not (out / name).is_file()]
    if missing:
        return f"is not {kind.name} (it holds no {missing[0]})"
    for path in sorted(out.iterdir()):
        if not _is_one_of(path, kind.holds):
            return f"holds {path.name}, which is not of {kind.name}"
        if path.name == ENGINES:
            engines = path.iterdir() if path.is_dir() else iter([path])
            for engine in sorted(engines):
                if not _is_one_of(engine, HIDDEN) and (why := why_not_replaced(engine, ENGINE)):
                    return f"its {ENGINES}/{engine.name} {why}"
    return ""


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _replace(out: Path, part: Path) -> None:
    """Put ``part`` in the place of ``out``, whose content goes. There is always a folder at ``out``, where the system
    can exchange two; elsewhere it comes back if the second of two renames does not come.
    """
    if _exchanged(out, part):
        return  # the caller removes what is at ``part`` now
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    try:
        os.rename(out, old)
        os.rename(part, out)
    except BaseException:  # a signal too
        if old.exists() and not os.path.lexists(out):
            os.rename(old, out)
        raise
    shutil.rmtree(old)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether the paths ``a`` and ``b`` have exchanged what they name, at once. Linux can, on most file systems."""
    with suppress(OSError, AttributeError, TypeError):  # TypeError: of Windows
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
        done: int = ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange)
        return done == 0
    return False


def _leftovers(out: Path, kind: str) -> list[Path]:
    """Folders ``.NAME.KIND-PID`` beside ``out`` whose process is gone."""
    prefix = f".{out.name}.{kind}-"
    neighbours = out.parent.iterdir() if out.parent.is_dir() else ()
    pids = {path: path.name.removeprefix(prefix) for path in neighbours if path.name.startswith(prefix)}
    return [path for path, pid in pids.items() if pid.isdecimal() and not _alive(int(pid))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
