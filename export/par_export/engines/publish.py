"""How an engine of any kind gets to its place: built once, hashed, kept in the cache, renamed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from par_export.engines.cache import EngineCache, key_of
from par_export.errors import BuildError
from par_export.staging import ENGINE, staging
from par_model import config, manifest, objects, ordering
from par_runtime.backends.engines import MOST_OF_A_PROFILE, MOST_PROFILES, Engine
from par_runtime.bundle import Bundle
from par_runtime.checked import shown
from par_runtime.errors import EngineError
from par_runtime.system import explain

#: The modules of ``par_model`` that engines are built with. Its other parts, trainers above all, may change without a
#: new build. A test holds this to what is imported.
MODEL: tuple[ModuleType, ...] = (config, manifest, objects, ordering)


class Keeping(Protocol):
    """The part of a request that says where engines are kept."""

    @property
    def use_cache(self) -> bool: ...
    @property
    def cache_folder(self) -> Path | None: ...
    @property
    def cache_limit_bytes(self) -> int: ...


def cache_of(request: Keeping, say: Callable[[str], None]) -> EngineCache | None:
    """The cache of built engines; None where it is not wanted, or cannot be used, which ``say`` says."""
    if not request.use_cache:
        return None
    cache = None if request.cache_folder is None else EngineCache(request.cache_folder, request.cache_limit_bytes)
    why = "this user has no home folder; PARVIS_CACHE names another" if cache is None else cache.why_unusable()
    if why:
        say(f"the engine cache is not used: {why}")
        return None
    return cache


def publish(
    out: Path,
    bundle: Bundle,
    cache: EngineCache | None,
    ingredients: Mapping[str, Any],
    write: Callable[[Path], None],
    say: Callable[[str], None],
) -> None:
    """Put the engine of ``bundle`` at ``out``: from ``cache``, or made by ``write``, which gets an empty folder.

    ``ingredients`` are all that decides what ``write`` makes. A folder at ``out`` that is an engine is replaced, at the
    very end. Raises what ``write`` raises, OutputError, OSError.
    """
    key = key_of(ingredients)
    lock = _unlocked() if cache is None else cache.locked(key)
    with lock, staging(out, force=True, kind=ENGINE) as folder:
        shutil.rmtree(folder)
        if cache is not None and cache.get(key, folder) and _intact(folder, bundle):
            say(f"{out}: taken from the engine cache ({key[:12]})")
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write(folder)
        if cache is not None:
            try:
                cache.put(key, folder)
            except OSError as error:  # the engine is built: a full cache must not lose it
                say(f"not kept in the engine cache: {explain(error)}")


def check_images(images: tuple[int, ...]) -> None:
    """Raise BuildError where ``images`` are no batch sizes that an engine can be built for."""
    if not images or min(images) < 1 or list(images) != sorted(set(images)):
        raise BuildError(f"images {shown(images)}; expected ascending numbers from 1")
    if images[-1] > MOST_OF_A_PROFILE:
        raise BuildError(f"images {shown(images)}; an engine has at most {MOST_OF_A_PROFILE} images")
    if len(images) > MOST_PROFILES:
        raise BuildError(
            f"{len(images)} batch sizes; an engine has at most {MOST_PROFILES}: name fewer, a batch in between is "
            "padded to the next size"
        )


def source_hash(packages: Iterable[ModuleType]) -> str:
    """Hash of the source code that an engine depends on: after a change of it no cached engine is used.

    ``packages``: packages, whole, and modules.
    """
    digest = hashlib.sha256()
    for package in packages:
        if hasattr(package, "__path__"):
            folder = Path(package.__path__[0])
            files = sorted(folder.rglob("*.py"))
        else:
            files = [Path(str(package.__file__))]
            folder = files[0].parent
        for file in files:
            digest.update(f"{package.__name__}/{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _intact(folder: Path, bundle: Bundle) -> bool:
    """Whether an engine from the cache is whole: its files may be hard links to those of an engine that was damaged."""
    try:
        Engine.open(folder, bundle, verify="full")
    except EngineError:
        return False
    return True


@contextmanager
def _unlocked() -> Iterator[None]:
    yield
