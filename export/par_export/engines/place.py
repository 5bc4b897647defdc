"""Where the engines of a bundle are put. Where they are looked for is in ``par_runtime/backends/engines.py``."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from par_runtime.backends.engines import ENGINE_DIR, ENGINES, cached_engine_folder, engine_folder
from par_runtime.bundle import Bundle
from par_runtime.system import check_folder_writable


def place(bundle: Bundle, out: Path | None, say: Callable[[str], None]) -> Path:
    """The folder for the engines of ``bundle``: below ``out`` or ``PARVIS_ENGINE_DIR`` where one of them is given.

    Otherwise it is in the bundle or, where the bundle cannot be written, in the user's cache folder; ``say`` says so.
    Whatever loads the bundle looks in all of them but ``out``. Raises OSError where none can be
    written.
    """
    if out is not None:
        return engine_folder(bundle, out)
    if os.environ.get(ENGINE_DIR):
        return engine_folder(bundle, Path(os.environ[ENGINE_DIR]))
    inside = bundle.path / ENGINES
    try:
        check_folder_writable(inside)
    except OSError as error:
        cached = cached_engine_folder(bundle)
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or cached is None:
            raise
        check_folder_writable(cached)
        say(f"{bundle.path} cannot be written ({error.strerror}); the engine goes to {cached}, where it is found")
        return cached
    return inside
