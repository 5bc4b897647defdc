"""Pictures for the tests of ``parvis edit``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from par_runtime.cli import dispatch


def six_images(tiny: Path, folder: Path) -> Path:
    """Six generated images, three in a row."""
    out = folder / "sheet.png"
    which = ["--label", "1", "--label", "4", "--count", "3", "--columns", "3", "--seed", "1"]
    assert dispatch.main(["generate", str(tiny), *which, "--out", str(out), "--quiet"]) == 0
    return out


def small_photo(folder: Path) -> Path:
    """A photo: 40 wide, 20 high, JPEG."""
    rows, columns = np.mgrid[0:20, 0:40]
    pixels = np.stack([columns * 6, rows * 12, (rows + columns) * 4], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg", quality=95)
    return folder / "photo.jpg"
