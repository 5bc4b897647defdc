"""Real pictures and clips in folders: the tokens of each are those of the pipeline, and what does not fit is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluating import NAMES, TINY, clip_folder, png_folder
from PIL import Image
from recipe_scripts import raw_folder

from par_calibration import pictures as module
from par_calibration.errors import CalibrationError
from par_calibration.heldout import find
from par_calibration.pictures import find_pictures, turns
from par_runtime import Pipeline
from par_runtime.errors import RequestError

LABELS = [2, 2, 2, 0, 5, 0]
IN_TURNS = [3, 0, 4, 5, 1, 2]  #: of classes 0, 2, 5, 0, 2, 2, as folders have them


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def video(tiny_video: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_video, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def test_pictures_of_both_forms_have_the_tokens_of_the_pipeline(pipeline: Pipeline, tmp_path: Path) -> None:
    images = noise(6, 16, 16, 3)
    folder = png_folder(tmp_path / "png", images, LABELS, [name.upper().replace(" ", "_") for name in NAMES])
    (folder / "RED_FOX" / "notes.txt").write_text("no picture")
    (folder / "RED_FOX" / ".hidden.png").write_text("none either")
    (folder / ".cache").mkdir()
    by_number = png_folder(tmp_path / "numbers", images, LABELS, "012345")
    raw = raw_folder(tmp_path / "raw", images, np.array(LABELS), NAMES)
    tokens = pipeline.encode(images)
    for path, order in ((folder, IN_TURNS), (by_number, IN_TURNS), (raw, [0, 3, 4, 1, 5, 2])):
        found = find(pipeline.bundle, path, 99)
        assert found is not None
        np.testing.assert_array_equal(found.tokens, tokens[order])
        assert found.labels == tuple(LABELS[i] for i in order)
        assert (found.source, found.real) == (str(path), True)
        first = find(pipeline.bundle, path, 3)
        assert first is not None
        assert set(first.labels) == {0, 2, 5}  # one of each class
        np.testing.assert_array_equal(first.tokens, tokens[order[:3]])


def test_only_some_classes_are_as_many_as_there_are_of_them(pipeline: Pipeline, tmp_path: Path) -> None:
    images = noise(6, 16, 16, 3)
    png = png_folder(tmp_path / "png", images, LABELS)
    raw = raw_folder(tmp_path / "raw", images, np.array(LABELS), NAMES)
    codes = tmp_path / "codes.npz"
    tokens = pipeline.encode(images)
    np.savez(codes, tokens=tokens, labels=np.array(LABELS))
    for path in (png, raw, codes):
        found = find(pipeline.bundle, path, 4, [2, 5])
        assert found is not None
        assert sorted(found.labels) == [2, 2, 2, 5]
        assert {found.labels[0], found.labels[1]} == {2, 5}  # they take turns
        expected = {row.tobytes() for row in tokens[[0, 1, 2, 4]]}
        assert {row.tobytes() for row in found.tokens} == expected
        one = find(pipeline.bundle, path, 1, {5})
        assert one is not None
        np.testing.assert_array_equal(one.tokens, tokens[4:5])
    for path, text in ((png, "its folders hold no pictures of these classes"), (raw, "none of these classes"),
                       (codes, "no images of these classes")):  # fmt: skip
        with pytest.raises(CalibrationError, match=rf"{path}: .*{text}; give others with --label"):
            find(pipeline.bundle, path, 4, [1, 3])


def test_many_pictures_are_read_some_at_a_time(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = noise(11, 16, 16, 3), [i % 6 for i in range(11)]
    for folder in (png_folder(tmp_path / "png", images, labels), raw_folder(tmp_path / "raw", images, np.array(labels),
                   NAMES)):  # fmt: skip
        monkeypatch.setattr(module, "AT_ONCE", 4)
        found = find_pictures(pipeline.bundle, folder, 99)
        chunks = list(found.chunks())
        assert ([len(chunk) for chunk in chunks], len(found)) == ([4, 4, 3], 11)
        np.testing.assert_array_equal(np.concatenate(chunks), images)
        assert found.labels == tuple(labels)


def test_pictures_of_another_size_are_fitted_as_the_pipeline_does(pipeline: Pipeline, tmp_path: Path) -> None:
    large, wide = noise(2, 40, 40, 3), noise(2, 20, 50, 3)
    for path, images in (
        (raw_folder(tmp_path / "raw", large, np.array([0, 1]), NAMES), large),
        (png_folder(tmp_path / "wide", wide, [0, 1]), wide),
    ):
        found = find(pipeline.bundle, path, 9)
        assert found is not None
        np.testing.assert_array_equal(found.tokens, pipeline.encode(images))


def test_clips_of_both_forms_have_the_tokens_of_the_pipeline(video: Pipeline, tmp_path: Path) -> None:
    clips, labels = noise(4, 7, 16, 16, 3), [1, 1, 0, 2]  # two frames more than the bundle's
    raw = clip_folder(tmp_path / "raw", clips, labels, ["0", "1", "2"])
    grey = clip_folder(tmp_path / "grey", clips[..., :1], labels, ["0", "1", "2"])
    large = clip_folder(tmp_path / "large", noise(4, 5, 24, 24, 3), labels, ["0", "1", "2"])
    files = tmp_path / "files"
    for i, label in enumerate(labels):
        (files / str(label)).mkdir(parents=True, exist_ok=True)
        first, *rest = map(Image.fromarray, clips[i])
        first.save(files / str(label) / f"{i}.png", save_all=True, append_images=rest, duration=100)
    for path, frames, order in (
        (raw, clips, [0, 2, 3, 1]),
        (grey, clips[..., :1].repeat(3, -1), [0, 2, 3, 1]),
        (large, noise(4, 5, 24, 24, 3), [0, 2, 3, 1]),
        (files, clips, [2, 0, 3, 1]),
    ):
        found = find(video.bundle, path, 9)
        assert found is not None
        np.testing.assert_array_equal(found.tokens, video.encode(frames)[order])
        assert found.labels == tuple(labels[i] for i in order)


def test_the_turns_of_classes() -> None:
    assert turns([3, 3, 3, 1, 0]).tolist() == [0, 3, 4, 1, 2]
    assert turns([]).tolist() == []


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: (path / "labels.u8").write_bytes(b"\0"), "raw: meta.json has count 6, labels.u8 1 labels; make"),
        (
            lambda path: (path / "labels.u8").write_bytes(b"\6" * 6),
            "raw has label 6 and 6 class names; make them again",
        ),
        (lambda path: (path / "images.u8").write_bytes(b"\0"), "images.u8: has 1 bytes; expected 4608, 6x16x16x3 by"),
        (lambda path: (path / "meta.json").write_text("{"), "meta.json: not readable as JSON"),
        (lambda path: (path / "meta.json").write_text('{"count": 0}'), "count is 0; expected a whole number from 1"),
        (lambda path: edit(path, styles=[*NAMES[:5], "cat"]), "raw: unknown label 'cat'; this model has 6 classes"),
        (lambda path: edit(path, styles=["red fox"]), "raw has label 5 and 1 class names"),
    ],
)
def test_a_damaged_raw_folder_is_refused(pipeline: Pipeline, tmp_path: Path, damage: Damage, text: str) -> None:
    damage(raw_folder(tmp_path / "raw", noise(6, 16, 16, 3), np.array(LABELS), NAMES))
    with pytest.raises(CalibrationError) as error:
        find_pictures(pipeline.bundle, tmp_path / "raw", 9)
    assert str(error.value).startswith(f"--real {tmp_path}")
    assert text in str(error.value)


def edit(path: Path, **change: object) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | change))


@pytest.mark.parametrize("name", ["labels.u8", "meta.json"])
def test_a_raw_folder_that_lacks_a_file_is_refused(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    raw = raw_folder(tmp_path / "raw", noise(6, 16, 16, 3), np.array(LABELS), NAMES)
    (raw / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        find_pictures(pipeline.bundle, raw, 9)
    assert str(error.value.filename) == str(raw / name)


def test_images_where_clips_are_expected_and_the_reverse(pipeline: Pipeline, video: Pipeline, tmp_path: Path) -> None:
    images = raw_folder(tmp_path / "images", noise(3, 16, 16, 3), np.arange(3), ["0", "1", "2"])
    clips = clip_folder(tmp_path / "clips", noise(3, 5, 16, 16, 3), [0, 1, 2], ["0", "1", "2"])
    short = clip_folder(tmp_path / "short", noise(3, 4, 16, 16, 3), [0, 1, 2], ["0", "1", "2"])
    png = png_folder(tmp_path / "png", noise(3, 16, 16, 3), [0, 1, 2], "012")
    (tmp_path / "two" / "0").mkdir(parents=True)
    video.generate([0, 1], seed=0).save(tmp_path / "two" / "0" / "a.png")  # a sheet, which is one file
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "clips.u8").write_bytes(b"")
    for loaded, path, text in (
        (video, images, f"--real {images}: holds images, {video.bundle.path} makes clips; give clips"),
        (pipeline, clips, f"--real {clips}: holds clips, {TINY} makes images; give images"),
        (video, short, f"{short}: has 4 frames; expected a clip of 5 or more"),
        (video, png, f"{png}/0/000.png: has 1 frame; expected a clip of 5 or more"),
        (video, tmp_path / "two", f"{tmp_path}/two/0/a.png: holds 2 clips; give a file for each (--out-dir)"),
        (video, tmp_path / "cut", f"--real {tmp_path}/cut: not the raw form of clips"),
    ):
        with pytest.raises(RequestError) as error:
            find(loaded.bundle, path, 9)
        assert str(error.value).startswith(text)


def test_folders_of_no_class_or_no_pictures(pipeline: Pipeline, video: Pipeline, tmp_path: Path) -> None:
    named = png_folder(tmp_path / "named", noise(2, 16, 16, 3), [0, 1], ["red fox", "red foxes"])
    beyond = png_folder(tmp_path / "beyond", noise(1, 16, 16, 3), [0], ["6"])
    damaged = png_folder(tmp_path / "damaged", noise(1, 16, 16, 3), [0])
    (damaged / "red fox" / "000.png").write_bytes(b"hello")
    (tmp_path / "empty" / "otter").mkdir(parents=True)
    for loaded, path, text in (
        (pipeline, named, f"--real {named}: unknown label 'red foxes'; did you mean red fox?"),
        (video, named, f"--real {named}: label 'red fox': this bundle has no class names; give an index 0..2"),
        (pipeline, beyond, f"--real {beyond}: label 6: this model has classes 0..5"),
        (pipeline, named / "red fox", f"--real {named}/red fox: holds no folders"),
        (pipeline, tmp_path / "empty", f"--real {tmp_path}/empty: its folders hold no pictures; expected"),
        (pipeline, damaged, f"{damaged}/red fox/000.png: not an image that can be read"),
    ):
        with pytest.raises(RequestError) as error:
            find(loaded.bundle, path, 9)
        assert str(error.value).startswith(text)
        if text.startswith("--real"):
            assert "expected a folder with one folder of pictures for each class" in str(error.value)


def test_a_raw_folder_that_becomes_shorter_meanwhile_is_an_error_and_no_signal(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    raw = raw_folder(tmp_path / "raw", noise(6, 16, 16, 3), np.array(LABELS), NAMES)
    found = find_pictures(pipeline.bundle, raw, 6)
    with (raw / "images.u8").open("r+b") as file:
        file.truncate(5 * 16 * 16 * 3 - 1)
    with pytest.raises(CalibrationError, match=r"images\.u8: became shorter while it was read; give a folder"):
        list(found.chunks())
