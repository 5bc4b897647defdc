"""The scripts of ``models/recipe``, which lie in no package, as modules for tests."""

from __future__ import annotations

import importlib
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

RECIPE = Path(__file__).parents[1] / "models/recipe"
STYLES: list[str] = json.loads((RECIPE.parent / "demo" / "manifest.json").read_text())["class_names"]


@contextmanager
def scripts(*names: str) -> Iterator[list[ModuleType]]:
    """The modules ``names``, as they find each other when one of them runs; afterwards none of them is imported."""
    before, known = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(RECIPE), str(RECIPE / "video")]
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            if name not in known and Path(getattr(module, "__file__", None) or "/").parent in (
                RECIPE,
                RECIPE / "video",
            ):
                del sys.modules[name]


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The system refuses files of more than ``room`` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def raw_folder(path: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str] = STYLES) -> Path:
    """A folder of raw images as ``render.mjs`` writes it: ``images`` uint8 [M,S,S,3], ``labels`` [M]."""
    path.mkdir()
    images.tofile(path / "images.u8")
    labels.astype(np.uint8).tofile(path / "labels.u8")
    meta = {"count": len(images), "size": images.shape[1], "styles": list(names)}
    (path / "meta.json").write_text(json.dumps(meta))
    return path
