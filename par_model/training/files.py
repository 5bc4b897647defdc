"""What trainers and the scripts of the recipe share about files: errors, whole outputs, and outputs that are inputs.

No torch here, since ``models/recipe/pack.py`` needs only numpy.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from par_model.system import naming

try:
    import fcntl
except ImportError:  # Windows: there nothing stops two processes that write into one folder
    fcntl = None  # type: ignore[assignment]

#: What a training writes into the folder of its run, beside sheets of samples.
RUN_FILES = ("checkpoint.pt", "model.pt", "log.jsonl", "sheet.png")
#: How the names of weights end: an output of such a name in a folder of weights makes it two models.
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


class InputError(Exception):
    """An input that a trainer cannot use; the message states what is expected and how to fix it."""


def text_of(error: Exception) -> str:
    """The message of an expected error: of one of the system, the file and the reason."""
    if isinstance(error, OSError) and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """The path of a hidden file beside ``path``, which is renamed to it at the end.

    On an error ``path`` stays as it was, the hidden file is removed, and an OSError names ``path``.
    """
    part = path.parent / f".{path.name[:40]}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename in (None, str(part), part):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # where its folder is none there is no such file, and the error says so
            part.unlink(missing_ok=True)


@contextmanager
def written_together(*paths: Path) -> Iterator[list[Path]]:
    """Hidden files beside ``paths``, which become them at the end, when all are whole: files of one set never mix with
    those of an earlier one. On an error before that all ``paths`` stay as they were.

    Where an OSError may name no file, as that of a full disk, :func:`par_model.system.naming` says which one it was.
    """
    for path in paths:
        if path.is_dir():  # found when it is renamed, the others would be new already
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with ExitStack() as files:
        yield [files.enter_context(written_beside(path)) for path in paths]


def check_run_files(run: Path) -> None:
    """Raise InputError or OSError where a file of the training in the folder ``run`` could not be written, before there
    is anything to lose. Nothing stays.
    """
    for path in (*(run / name for name in RUN_FILES), *run.glob("sheet-*.png")):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; expected a file: take it away, or give another --run folder")
    log = run / "log.jsonl"
    for path in (log, run / f".{os.getpid()}.part"):  # one that is appended to, and one that is renamed at the end
        new = not os.path.lexists(path)
        with naming(run if new else path), (path if new else regular(path)).open("ab"):
            pass
        if new:
            path.unlink()


def folder_for(option: str, path: Path, error: type[Exception] = InputError) -> None:
    """Raise ``error`` where ``path``, given as ``option``, cannot be a folder to write into: it is a file."""
    if os.path.lexists(path) and not path.is_dir():  # a link to nothing is no folder either
        what = "is a link that leads to no folder" if path.is_symlink() else "is a file"
        raise error(f"{option} {path}: {what}; expected a folder, which may be new: give another name")


@contextmanager
def alone_in(option: str, folder: Path, error: type[Exception] = InputError) -> Iterator[None]:
    """Make ``folder``, given as ``option``, and keep other processes that ask for it out until the end.

    Nothing is written into it: the system holds the lock, and releases that of a process that was killed. A new folder
    that is empty at the end goes. Raises ``error`` where another process has the folder, or it is a file; OSError.
    """
    folder_for(option, folder, error)
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    busy = error(
        f"{option} {folder}: another process writes into it now; wait until that one has ended, or give another folder"
    )
    try:
        number = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has just ended, and removed it
        raise busy from None
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system of a network may have no locks for folders
            pass
        if not _is_at(number, folder):  # its process ended and removed it: what is locked is no longer there
            raise busy
        yield
    finally:
        for each in new:
            with suppress(OSError):  # it is not empty
                each.rmdir()
        os.close(number)


def _is_at(number: int, path: Path) -> bool:
    """Whether what was opened as ``number`` is what ``path`` names now."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except OSError:
        return False


def keep_inputs(option: str, outputs: Iterable[Path], **inputs: Path | None) -> None:
    """Raise InputError where one of ``outputs``, made by ``option``, would replace one of ``inputs`` or mix into it.

    ``inputs``: by the names of their options, ``_`` for ``-``; files, or folders of data or of weights. A folder of
    data takes no output at all (a sheet would be a picture of it); one of weights, none of a name that weights have, or
    that is there. Links are followed.
    """
    for output in outputs:
        for name, given in inputs.items():
            if given is not None and (what := _spoils(output, given)) is not None:
                raise InputError(
                    f"{option}: would write {output}, {what} --{name.replace('_', '-')} {given}; give another place, "
                    "outside of the inputs"
                )


def _spoils(output: Path, given: Path) -> str | None:
    """What ``output`` would do to the input ``given``; None where it does nothing to it."""
    if same(output, given):
        return "which is"
    if given.name.endswith(".index.json"):  # of shards, which lie beside it
        given = given.parent
    if not given.is_dir() or not followed(output).is_relative_to(followed(given)):
        return None
    if any(file.name.endswith(WEIGHTS) for file in given.iterdir()):
        beside = same(output.parent, given)
        return "in the folder of" if beside and (output.exists() or output.name.endswith(WEIGHTS)) else None
    return "in the folder of"


def same(a: Path, b: Path) -> bool:
    """Whether two paths are the same file or folder, over links too."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return followed(a) == followed(b)


def followed(path: Path) -> Path:
    """``path`` without links. Unlike ``Path.resolve`` on Python before 3.13 it takes links that lead to each other."""
    return Path(os.path.realpath(path))


def regular(path: Path) -> Path:
    """``path``, where reading it does not wait for somebody to write. Raises InputError (a pipe, a device), OSError."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # that of a folder the system says
        raise InputError(f"{path}: is a pipe or a device; expected a file")
    return path


def keep_run_inputs(run: Path, **inputs: Path | None) -> None:
    """:func:`keep_inputs` for the folder of a training, ``--run``; that must not be a file either."""
    folder_for("--run", run)
    keep_inputs(f"--run {run}", (run / name for name in RUN_FILES), **inputs)
