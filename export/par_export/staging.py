"""A folder that appears whole or not at all: written beside its place under a hidden name, then renamed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TargetError(Exception):
    """The place asked for cannot be written; the message says how to fix it."""


@contextmanager
def staging(out: Path, force: bool, marker: str = "manifest.json") -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` at the end, or nothing at all.

    ``force`` replaces what is there, if it holds ``marker``. Folders that killed processes left are removed.
    Raises TargetError.
    """
    out = out.absolute()
    for old in _leftovers(out, "old"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames below: what was to be replaced goes back
            os.rename(old, out)
    if out.exists() and not force:
        raise TargetError(f"{out} exists; give another --out, or --force to replace it")
    if out.exists() and not (out / marker).is_file():
        kind = "a bundle" if marker == "manifest.json" else "an engine"
        raise TargetError(
            f"{out} exists and is not {kind} (it holds no {marker}); only such a folder is replaced; move it away"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in _leftovers(out, "part"):
        shutil.rmtree(stale, ignore_errors=True)
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    part.mkdir()
    main = threading.current_thread() is threading.main_thread()  # only there may signals be handled
    # So that the cleanup below runs.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if main else None
    try:
        yield part
        if out.exists():
            old = out.parent / f".{out.name}.old-{os.getpid()}"
            os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old)
        else:
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if main:
            signal.signal(signal.SIGTERM, previous)


def _leftovers(out: Path, kind: str) -> list[Path]:
    """Folders ``.NAME.KIND-PID`` beside ``out`` whose process is gone."""
    prefix = f".{out.name}.{kind}-"
    found = out.parent.iterdir() if out.parent.is_dir() else ()
    pids = {path: path.name.removeprefix(prefix) for path in found if path.name.startswith(prefix)}
    return [path for path, pid in pids.items() if pid.isdecimal() and not _alive(int(pid))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
