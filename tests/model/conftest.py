"""Data that the trainers are tested on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 8x8 in 2 classes, in the raw form: left or right half bright."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    labels = np.arange(48, dtype=np.uint8) % 2
    pixels = rng.integers(0, 60, (48, 8, 8, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, :, 4 * label : 4 * label + 4] += 180
    pixels.tofile(folder / "images.u8")
    labels.tofile(folder / "labels.u8")
    (folder / "meta.json").write_text(json.dumps({"count": 48, "size": 8, "styles": ["left", "right"]}))
    return folder
