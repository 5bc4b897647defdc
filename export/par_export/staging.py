"""A folder that appears whole or not at all: it is written beside its place under a hidden name, then renamed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from par_export.errors import OutputError
from par_runtime.bundle import MANIFEST
from par_runtime.system import NO_ROOM


@contextmanager
def staging(out: Path, force: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """Yield a hidden folder beside ``out``, which is renamed to ``out`` at the end; on an error it is removed.

    ``force`` replaces a folder at ``out`` if it holds the file ``marker``. Hidden folders of killed processes are
    removed. Raises OutputError, OSError.
    """
    out = out.absolute()
    for old in _leftovers(out, "old"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # a process was killed between the two renames below: the folder that it was replacing goes back
            os.rename(old, out)
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists; give another --out, or --force to replace it")
    if os.path.lexists(out) and not (out / marker).is_file():
        kind = "a bundle" if marker == MANIFEST else "an engine"
        raise OutputError(
            f"{out} exists and is not {kind} (it holds no {marker}); only such a folder is replaced; move it away"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in _leftovers(out, "part"):
        shutil.rmtree(stale, ignore_errors=True)
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    # SIGTERM raises SystemExit, so that the cleanup below runs.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if main else None
    try:
        part.mkdir()
        yield part
        if out.exists() and not force:
            raise OutputError(f"{out} was made by another command meanwhile and is kept; give another --out")
        if out.exists():
            old = out.parent / f".{out.name}.old-{os.getpid()}"
            os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old)
        else:
            os.rename(part, out)
    except OSError as error:  # the caller knows ``out``, not the hidden folder
        if isinstance(error.filename, str) and error.filename.startswith(str(part)):
            error.filename, error.filename2 = str(out) + error.filename.removeprefix(str(part)), None
        elif error.filename is None and error.errno in NO_ROOM:
            error.filename = str(out)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if main:
            signal.signal(signal.SIGTERM, previous)


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
