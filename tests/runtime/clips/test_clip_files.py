"""Files of clips: written with their recipe and read again, in every format; and those that an enemy made."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipe_scripts import full_disk

from par_runtime.clips import files, formats, mp4
from par_runtime.errors import RequestError
from par_runtime.images.recipe import Recipe
from par_runtime.request import Settings

ENDINGS = (".gif", ".webp", ".apng", ".png", ".mp4")
LOSSLESS = (".webp", ".apng", ".png")


def clips(count: int = 3) -> np.ndarray:
    """Clips [B,5,16,16,3] of smooth colours that move; frames 2 and 3 of each are the same."""
    y, x = np.mgrid[:16, :16]
    each = [[np.stack([x * 9 + t * 20 + b, y * 13, (x + y) * 5 + t * 7], -1) for t in range(5)] for b in range(count)]
    out = np.array(each).astype(np.uint8)
    out[:, 3] = out[:, 2]
    return out


def recipe(count: int = 3, **more: object) -> Recipe:
    settings = [Settings(guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, greedy=False)] * count
    numbers, tokens = list(range(count)), np.arange(count * 192).reshape(count, 192) % 64
    given = {"columns": 2, "fps": 8.0} | more
    return Recipe(
        "b", "0" * 64, labels=numbers, names=[None] * count, seeds=numbers, settings=settings, tokens=tokens, **given
    )  # type: ignore[arg-type]


def write(path: Path, of: Recipe, made: np.ndarray) -> None:
    path.write_bytes(files.content(path, of, made))


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_sheet_of_clips_is_read_as_it_was_written(tmp_path: Path, ending: str, scale: int) -> None:
    path, made = tmp_path / f"x{ending}", clips()
    write(path, recipe(scale=scale), made)
    first = path.read_bytes()
    write(path, recipe(scale=scale), made)
    assert path.read_bytes() == first
    found = files.read_any(path, 5)
    assert found.recipe is not None
    assert (found.recipe.fps, found.recipe.frames, found.recipe.columns) == (8.0, 5, 2)
    assert found.recipe.scale == ({1: 8, 3: 9}[scale] if ending == ".mp4" else scale)
    assert all(found.recipe.pixel_hashes or [""])
    assert (found.recipe.tokens == recipe().tokens).all()
    shown = found.clips((16, 16))
    assert shown is not None
    off = np.abs(shown.astype(int) - made)
    assert off.max() == 0 if ending in LOSSLESS else off.mean() < 5


@pytest.mark.parametrize("ending", [".gif", ".webp", ".apng", ".mp4"])
def test_a_clip_that_stands_still_has_all_its_frames(tmp_path: Path, ending: str) -> None:
    still = np.repeat(clips(1)[:, :1], 5, 1)
    write(tmp_path / f"x{ending}", recipe(1, columns=1), still)
    found = files.read_any(tmp_path / f"x{ending}", 5)
    assert found.frames.shape == (5, 16, 16, 3)
    assert all(found.recipe.pixel_hashes)  # type: ignore[union-attr, arg-type]


def test_clips_of_few_colours_lose_nothing_in_a_gif(tmp_path: Path) -> None:
    few = clips() // 64 * 64
    assert len(np.unique(few.reshape(-1, 3), axis=0)) <= 256
    write(tmp_path / "x.gif", recipe(), few)
    assert (files.read_any(tmp_path / "x.gif", 5).clips((16, 16)) == few).all()


def test_one_clip_that_was_changed_loses_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    write(path, recipe(), clips())
    with Image.open(path) as image:
        text = image.getexif()
    frames = files.read_any(path, 5).frames.copy()
    frames[4, 3, 20] ^= 1  # of the second clip
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], lossless=True, duration=125, exif=text.tobytes())
    found = files.read_any(path, 5).recipe
    assert found is not None
    assert [bool(each) for each in found.pixel_hashes or []] == [True, False, True]


def test_frames_of_other_files_by_their_times(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(6)]
    path = tmp_path / "x.webp"

    def red(durations: list[int], count: int = 9, start: int = 0) -> list[int]:
        images[0].save(path, save_all=True, append_images=images[1 : len(durations)], lossless=True, duration=durations)
        return files.read_any(path, count, start).frames[:, 0, 0, 0].tolist()

    assert red([100] * 6) == [0, 30, 60, 90, 120, 150]
    assert red([100] * 6, 2, 3) == [90, 120]
    assert red([33, 34, 33, 66, 33, 34]) == [0, 30, 60, 90, 90, 120, 150]
    with pytest.raises(RequestError, match=r"shown for 100 ms and for 150 ms, so it has no even number of frames"):
        red([100, 150, 100])
    with pytest.raises(RequestError, match="has 6 frames, so none from 7 on"):
        red([100] * 6, 2, 7)
    assert (
        formats.times_ms(8, 8, 10) == [120, 130, 120, 130, 120, 130, 120, 130]
        or sum(formats.times_ms(8, 8, 10)) == 1000
    )


def refused(path: Path, count: int = 5) -> str:
    with pytest.raises(RequestError) as error:
        files.read_any(path, count)
    said = str(error.value)
    assert said.startswith(str(path))
    assert said.isprintable()
    assert len(said) < 500
    return said


@pytest.mark.parametrize("ending", [".gif", ".webp", ".apng", ".mp4"])
def test_truncated_files_are_one_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    write(path, recipe(), clips())
    whole = path.read_bytes()
    for part in (0, 3, 13, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:part])
        refused(path)


def test_files_that_are_no_clips_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    assert "no such file" in refused(path)
    path.write_bytes(b"\x1aE\xdf\xa3" + b"x" * 100)  # Matroska begins so
    assert "expected a clip as GIF, WebP, animated PNG or MP4: convert" in refused(path)
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    refused(path)
    path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    assert "no clip that can be read" in refused(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    content = io.BytesIO()
    Image.new("P", (8, 8)).save(content, "GIF")
    bomb = bytearray(content.getvalue())
    bomb[6:10] = b"\xff\x7f\xff\x7f"  # the screen: 32767 a side
    path.write_bytes(bomb)
    assert "too many pixels" in refused(path)
    bomb[6:10] = b"\x00\x20\x00\x20"  # 8192 a side: one frame would do
    path.write_bytes(bomb)
    assert "5 frames of 8192x8192 are too many pixels" in refused(path)


def test_looking_for_an_animation_says_nothing_of_its_size(tmp_path: Path) -> None:
    path, content = tmp_path / "x.gif", io.BytesIO()
    Image.new("P", (8, 8)).save(content, "GIF")
    bomb = bytearray(content.getvalue())
    bomb[6:10] = (10_000).to_bytes(2, "little") * 2
    path.write_bytes(bomb)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not files.is_animation(path)
        assert "10000x10000 are too many pixels" in refused(path)
    assert not said


def test_a_gif_whose_frames_grow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    images = [Image.new("RGB", (8, 8), (30 * i, 0, 0)) for i in range(3)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    data = path.read_bytes()
    at = [found.start() for found in re.finditer(rb",\0\0\0\0\x08\0\x08\0", data)][1]
    path.write_bytes(data[: at + 5] + b"\x20\0\x20\0" + data[at + 9 :])
    assert "a frame of it is 32x32 pixels, unlike the first" in refused(path)


def test_an_mp4_that_points_to_other_streams_reads_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", encoding="utf-8")
    refused(path)


def test_what_fits_no_file_is_refused_before_any_work() -> None:
    for name, size, scale, says in (
        ("x.jpg", (16, 16), 1, r"which ends in \.gif"),
        ("x.mp4", (16, 16), 300, "at most 4096 on a side in MP4"),
        ("x.webp", (1, 20000), 1, "at most 16383 on a side in WebP"),
        ("x.gif", (2048, 2048), 2, "89478485 in all"),
    ):
        with pytest.raises(RequestError, match=says):
            formats.check_clips(Path(name), 1, 1, 17, size, scale)
    for fps in (0, 61, float("nan"), "8", True):
        with pytest.raises(RequestError, match="fps"):
            formats.check_fps(fps)
    with pytest.raises(RequestError, match="50"):
        formats.check_fps(60, Path("x.gif"))
    assert formats.mp4_scale((15, 16), 1) == 10
    assert formats.mp4_scale((128, 128), 1) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_is_said_of_the_file_that_the_user_named(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other file is written, in no other folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    path, frames = tmp_path / f"x{ending}", clips(1)[0]
    path.write_text("before")
    with full_disk(100), pytest.raises(OSError, match="File too large") as caught:
        files.write_frames(path, frames, 8.0)
    assert caught.value.filename == str(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "before"}
    files.write_frames(path, frames, 8.0)
    assert len(files.read_any(path, 9).frames) == 5


def test_without_pyav_an_mp4_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(RequestError, match=r"MP4 needs PyAV, which is not installed; .*install"):
        mp4.library()
    with pytest.raises(RequestError, match="MP4 needs PyAV"):
        write(tmp_path / "x.mp4", recipe(), clips())
