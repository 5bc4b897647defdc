"""The recipe's comparison of sampling settings: what its figures mean, the sheet, and folders that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from recipe_scripts import STYLES, raw_folder, scripts

from par_model.training.files import InputError
from par_model.training.raw import RawImages
from par_runtime import Pipeline
from par_runtime.bundle import Bundle

DEMO = Path(__file__).parents[2] / "models" / "demo"
N1 = DEMO.parent / "demo-n1"
TINY = Path(__file__).parents[1] / "data" / "tiny"
EACH = 2


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``settings.py``."""
    with scripts("settings") as (module,):
        yield module


@pytest.fixture(scope="module")
def made() -> np.ndarray:
    """Pictures of the demo's styles: two of each class in turns, those that its bundle holds out."""
    with Pipeline.load(DEMO) as pipeline, np.load(DEMO / "heldout.npz") as stored:
        assert list(stored["labels"][: 12 * EACH]) == list(range(12)) * EACH
        return pipeline.decode(stored["tokens"][: 12 * EACH].astype(np.int64))


@pytest.mark.parametrize("bundle", [TINY, pytest.param(DEMO, marks=pytest.mark.slow)], ids=lambda path: path.name)
def test_images_that_are_the_held_out_ones_have_no_distance_and_the_same_spread(
    bundle: Path, recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Pipeline.load(bundle) as pipeline:
        names, size, defaults = pipeline.bundle.class_names, pipeline.bundle.image_size[0], pipeline.bundle.defaults
        assert names is not None
        classes = len(names)
        made = pipeline.generate([i % classes for i in range(classes * EACH)], seed=0).images
    assert made is not None
    other = np.random.default_rng(0).integers(256, size=made.shape).astype(np.uint8)
    images = np.concatenate([made, other])
    held_out = raw_folder(tmp_path / "val", images, np.arange(len(images)) % classes, names)
    out = tmp_path / "sheet.png"
    command = [str(bundle), "--held-out", str(held_out), "--out", str(out), "--each", str(EACH), "--shown", "1"]
    settings = ["--guidance", str(defaults.guidance), "--top-p", str(defaults.top_p), "--temperature", "1", "0.01"]
    assert recipe.main([*command, *settings]) == 0, capsys.readouterr()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["guidance", "temperature", "top-p", "distance", "spread"]
    assert rows[1][:2] == ["held", "out"]
    assert float(rows[1][2]) > 0.1  # noise is no image of the bundle
    assert rows[2] == [f"{defaults.guidance:g}", "1", f"{defaults.top_p:g}", "0.000", "1.00"]
    assert rows[3][:3] == [f"{defaults.guidance:g}", "0.01", f"{defaults.top_p:g}"]
    assert float(rows[3][3]) > 0.001
    assert float(rows[3][4]) < float(rows[2][4])  # cold: the images of a class are alike
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * size, classes * size, 3)
    np.testing.assert_array_equal(pixels[:size], np.concatenate(list(made[:classes]), axis=1))


@pytest.mark.slow
def test_a_bundle_without_encoder_is_compared_by_the_encoder_of_another(
    recipe: ModuleType, made: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = raw_folder(tmp_path / "val", np.concatenate([made, made[::-1]]), np.r_[0:24, 23:-1:-1] % 12)
    command = [str(N1), "--held-out", str(held_out), "--out", str(tmp_path / "sheet.png"), "--each", "2"]
    assert recipe.main(command) == 2
    assert "demo-n1: has no encoder of images, whose features are compared; give" in capsys.readouterr().err
    one = ["--guidance", "1.5", "--top-p", "0.85", "--encoder-of", str(DEMO)]
    assert recipe.main([*command, *one]) == 0, capsys.readouterr()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2][:3] == ["1.5", "1", "0.85"]
    assert 0 < float(rows[2][3]) < 0.1  # drawings of the same styles
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 12 * 64, 64)


def test_spread_is_the_variance_within_a_class(recipe: ModuleType) -> None:
    features = np.array([[0.0, 0.0], [2.0, 4.0], [10.0, 0.0], [10.0, 0.0]])
    assert recipe.spread(features, np.array([0, 0, 1, 1])) == 2.5  # (1 + 4) and 0


def test_what_does_not_fit_is_said_and_nothing_is_written(
    recipe: ModuleType, made: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(48) % 12
    images = np.concatenate([made, made])
    held_out = raw_folder(tmp_path / "val", images, labels)
    same = raw_folder(tmp_path / "same", np.zeros_like(images), labels)
    small = raw_folder(tmp_path / "small", images[:, ::2, ::2].copy(), labels)
    eleven = raw_folder(tmp_path / "eleven", np.delete(images, np.s_[11::12], 0), np.arange(44) % 11, STYLES[:11])
    other = raw_folder(tmp_path / "other", images, labels, [*STYLES[:11], "thumb"])
    out = tmp_path / "sheet.png"
    for data, more, message in (
        (held_out, ["--each", "3"], "needs 6 held-out images of every class, one has 4; give less"),
        (held_out, ["--each", "1"], "--each 1: expected"),
        (same, [], "the first 2 images of each class are the same"),
        (held_out, ["--top-p", "0"], "--top-p 0.0: expected"),
        (held_out, ["--out", str(held_out / "sheet.png")], "would write"),
        (tmp_path / "none", [], "none"),
        (small, [], "12 classes of images of 32x32 pixels; the bundle makes 12 classes of 64x64"),
        (other, [], f"{other}: class 11 is 'thumb', not 'thumbs' as in {DEMO}; give the images that it was made for"),
        (eleven, [], "11 classes of images of 64x64 pixels; the bundle makes 12"),
    ):
        command = [str(DEMO), "--held-out", str(data), "--out", str(out), "--each", "2", *more]
        assert recipe.main(command) == 2, message
        assert message in capsys.readouterr().err
    clips = DEMO.parent / "fashion"
    command = [str(DEMO), "--held-out", str(held_out), "--out", str(out), "--each", "2", "--encoder-of"]
    assert recipe.main([*command, str(clips)]) == 2
    assert "fashion: has no encoder of images" in capsys.readouterr().err
    bundle = Bundle.open(DEMO)
    opened = RawImages.open(held_out)
    bare = replace(bundle, graphs={name: graph for name, graph in bundle.graphs.items() if name != "encoder"})
    with pytest.raises(InputError, match="has no encoder of images"):
        recipe.check(bundle, bare, opened, held_out)
    for size, makes in (((32, 48), "images of 48x32 pixels"), (None, "no images")):
        with pytest.raises(InputError, match=f"encodes images of 64x64 pixels, .*demo makes {makes}: give two bundles"):
            recipe.check(replace(bundle, image_size=size), bundle, opened, held_out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eleven", "other", "same", "small", "val"]


def test_figures_of_images_that_no_training_has_seen(
    made: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = raw_folder(tmp_path / "val", made, np.arange(24) % 12)
    train = raw_folder(tmp_path / "train", made[:20], np.arange(20) % 12)
    command = [str(DEMO), "--held-out", str(val), "--train"]
    turned = raw_folder(tmp_path / "turned", made, np.arange(24) % 12, STYLES[::-1])
    with scripts("figures") as (figures,):
        assert figures.main([str(DEMO), "--held-out", str(turned), "--train", str(train)]) == 2
        assert f"turned: class 0 is 'thumbs', not 'adventurer' as in {DEMO}; give" in capsys.readouterr().err
        assert figures.main([*command, str(train)]) == 0, capsys.readouterr()
        printed = capsys.readouterr().out
        assert figures.main([*command, str(val)]) == 2
        assert "every image is in" in capsys.readouterr().err
    with Pipeline.load(DEMO) as pipeline:
        tokens = pipeline.encode(made[20:])
        nats = -pipeline.score(tokens, [8, 9, 10, 11]).mean()
        again = pipeline.decode(tokens)
    psnr = 10 * np.log10(255**2 / ((again.astype(float) - made[20:]) ** 2).mean())
    assert printed.startswith(f"4 images: {nats:.3f} nats per token, {psnr:.2f} dB, 0.")
    assert 1 < nats < 4
