"""The recipe's step that puts real images into a bundle: what it takes, and that a good bundle is never spoilt."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from recipe_scripts import STYLES, raw_folder, scripts

from par_calibration import heldout
from par_runtime import Pipeline
from par_runtime.bundle import Bundle

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``heldout.py``."""
    with scripts("heldout") as (module,):
        yield module


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Two pictures of each class of the demo, in turns."""
    with Pipeline.load(MODELS / "demo") as pipeline, np.load(MODELS / "demo" / "heldout.npz") as stored:
        assert list(stored["labels"][:24]) == [*range(12), *range(12)]
        return pipeline.decode(stored["tokens"][:24].astype(np.int64))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / "demo-n16", tmp_path / "n16"))


def test_images_of_no_training_become_those_of_the_bundle(
    recipe: ModuleType, bundle: Path, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = raw_folder(tmp_path / "val", images, np.arange(24) % 12)
    train = raw_folder(tmp_path / "train", images[:3], np.arange(3))
    assert recipe.main([str(bundle), "--held-out", str(val), "--train", str(train), "--each", "1"]) == 0
    assert "heldout.npz: 12 images, " in capsys.readouterr().out
    opened = Bundle.open(bundle, verify="full")
    found = heldout.read(opened, bundle / "heldout.npz", "held-out images")
    with Pipeline.load(bundle) as pipeline:  # the first of a class that is not in the training
        np.testing.assert_array_equal(found.tokens, pipeline.encode(images[3:15]))
    assert list(found.labels) == [*range(3, 12), 0, 1, 2]


def test_what_does_not_fit_is_said_and_the_bundle_stays(
    recipe: ModuleType, bundle: Path, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(24) % 12
    val = raw_folder(tmp_path / "val", images, labels)
    train = raw_folder(tmp_path / "train", images[:3], labels[:3])
    small = raw_folder(tmp_path / "small", images[:, ::2, ::2].copy(), labels)
    more = raw_folder(tmp_path / "more", images, np.arange(24) % 13, [*STYLES, "more"])
    turned = raw_folder(tmp_path / "turned", images, labels, [*STYLES[:3], STYLES[4], STYLES[3], *STYLES[5:]])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fits = "12 classes of 64x64 pixels: give the images that it was made for"
    for held_out, seen, each, text in (
        (val, train, "0", "--each 0: expected 1 to 1000000"),
        (val, train, "-1", "--each -1: expected 1 to 1000000"),
        (val, val, "20", f"{val}: every image is in {val} too; give images that are not"),
        (more, train, "20", f"{more}: 13 classes of images of 64x64 pixels; the bundle makes {fits}"),
        (small, train, "20", f"{small}: 12 classes of images of 32x32 pixels; the bundle makes {fits}"),
        (turned, train, "20", f"{turned}: class 3 is 'lorelei', not 'dylan' as in {bundle}; give the images that it"),
        (val, turned, "20", f"{turned}: class 3 is 'lorelei', not 'dylan' as in {bundle}; give the images that it"),
        (val, small, "20", f"{small}: 12 classes of images of 32x32 pixels; the bundle makes {fits}"),
        (tmp_path / "a\nb", train, "20", f"{tmp_path}/a\\nb/meta.json: no such file or folder"),
    ):
        assert recipe.main([str(bundle), "--held-out", str(held_out), "--train", str(seen), "--each", each]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"heldout.py: error: {text}")
        assert (printed.err.count("\n"), printed.out) == (1, "")
    clips = str(MODELS / "fashion")
    assert recipe.main([clips, "--held-out", str(val), "--train", str(train)]) == 2
    assert "fashion: makes clips; give a bundle of images" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_full_at_the_manifest_leaves_the_bundle_whole(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    opened = Bundle.open(bundle)
    tokens = heldout.read(opened, bundle / "heldout.npz", "").tokens[:12]
    monkeypatch.setattr(heldout, "seal", lambda entries: entries | {"broken": object()})
    with pytest.raises(TypeError):  # behind the new images, before the new manifest
        heldout.attach(opened, tokens, list(range(12)))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    Bundle.open(bundle, verify="full")
