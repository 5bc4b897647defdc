"""Built engines, addressed by content, so that the same build is never made twice on a machine.

An entry is a whole engine folder under the hash of everything that went into it. Entries appear by one rename. Of two
processes that need the same build one waits for the other. The least recently used are removed when the cache is too
large.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from par_runtime.system import check_folder_writable, explain

try:
    import fcntl
except ImportError:  # Windows: there the user must not run the same build twice at a time
    fcntl = None  # type: ignore[assignment]

DEFAULT_LIMIT_BYTES = 40 * 10**9
STALE_SECONDS = 24 * 3600


@contextmanager
def locked_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock that the file ``path`` stands for; it is made. A killed process releases its lock.

    Where another process holds it: ``wait`` for that one, or raise BlockingIOError.
    """
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def key_of(ingredients: Mapping[str, Any]) -> str:
    """sha256 (hex) of ``ingredients``, everything that decides what a build makes."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


class EngineCache:
    """The folder of built engines, kept below ``limit_bytes`` in sum."""

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder / "engines", limit_bytes

    def why_unusable(self) -> str:
        """Why nothing can be kept here; "" where it can."""
        try:
            check_folder_writable(self.folder)
        except OSError as error:
            return explain(error)
        return ""

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of ``key``; other processes wait for it. A killed process releases its lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked_file(self.folder / f"{key}.lock"):
            yield

    def get(self, key: str, out: Path) -> bool:
        """Copy the entry of ``key`` to ``out``, which must not exist; False if there is none."""
        entry = self.folder / key
        if not entry.is_dir():
            return False
        _copy(entry, out)
        os.utime(entry)
        return True

    def put(self, key: str, built: Path) -> None:
        """Keep a copy of the folder ``built`` under ``key``, unless it alone is over the limit.

        Raises OSError, which names this cache.
        """
        if _size(built) > self.limit_bytes:
            return
        part = self.folder / f".{key}.part-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        try:
            _copy(built, part)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            part.rename(self.folder / key)
        except OSError as error:
            error.filename, error.filename2 = str(self.folder), None
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._shrink(keep=key)

    def _shrink(self, keep: str) -> None:
        """Remove what killed builds left, then the least recently used entries until the limit is kept."""
        for part in self.folder.glob(".*.part-*"):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: _size(path) for path in entries}
        total = sum(sizes.values())
        for path in sorted(entries, key=lambda p: p.stat().st_mtime):
            if total <= self.limit_bytes:
                return
            if path.name != keep:
                shutil.rmtree(path, ignore_errors=True)
                (self.folder / f"{path.name}.lock").unlink(missing_ok=True)
                total -= sizes[path]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _copy(source: Path, out: Path) -> None:
    """Copy a folder of files, by hard links where possible: plans are gigabytes, and are never changed."""
    out.mkdir(parents=True)
    for file in source.iterdir():
        if not file.is_file() or file.name.endswith(".runtime.cache"):  # the runtime writes these
            continue
        try:
            os.link(file, out / file.name)
        except OSError:
            shutil.copyfile(file, out / file.name)
