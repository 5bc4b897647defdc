"""Video bundles through the runtime and the command line: clips are made, kept in part, previewed and made again."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from par_runtime import Bundle, Pipeline
from par_runtime.cli import edit, generate, reconstruct, redo
from par_runtime.clips.animated import as_webp
from par_runtime.clips.files import content, read_any, write_frames
from par_runtime.errors import RequestError
from par_runtime.images.recipe import Recipe, entry
from par_runtime.images.recipe import check as check_recipe
from par_runtime.metrics import psnr_db
from par_runtime.result import Result, default_columns
from par_runtime.tokenizer import Tokenizer

GENERATE = Pipeline.generate
FASHION = Path(__file__).parents[2] / "models/fashion"


@pytest.fixture
def tiny(tiny_video: Path) -> Path:
    return tiny_video


def test_what_a_clip_is(tiny: Path) -> None:
    with Pipeline.load(tiny) as pipeline:
        made = pipeline.generate([0, 1, 2], seed=3, guidance=2.0)
        assert made.images is not None
        assert made.images.shape == (3, 5, 16, 16, 3)
        assert "3 clips, 5 frames of 16x16" in repr(made)
        assert len(made.pil()) == 15
        shown = Image.open(io.BytesIO(made._repr_png_() or b""))
        assert (shown.n_frames, shown.size) == (5, (48, 16))  # type: ignore[attr-defined]


def test_previews_show_the_frames_that_are_begun(tiny: Path) -> None:
    shapes = []
    with Pipeline.load(tiny) as pipeline:
        made = pipeline.generate(
            0, seed=1, preview_every=4, on_preview=lambda images, done, _: shapes.append((done, images.shape[1]))
        )
        assert made.images is not None
        assert [frames for _, frames in shapes] == sorted(frames for _, frames in shapes)
        assert {frames for _, frames in shapes} == {1, 3, 5}
        size = pipeline.bundle.frame_tokens
        assert (pipeline.preview(made.tokens, 2 * size) == made.images[:, :3]).all()
        again = pipeline.preview(made.tokens, size + 4)  # the second latent frame but for four tokens is the first
        mixed = np.concatenate([made.tokens[:, : size + 4], made.tokens[:, 4:size]], axis=1)
        assert (again == pipeline.decode(mixed)).all()


def test_frames_that_are_kept(tiny: Path) -> None:
    with Pipeline.load(tiny) as pipeline:
        made = pipeline.generate(1, seed=1)
        assert made.images is not None
        keep = pipeline.keep_mask(keep_frames=4)  # frames 0, 1-2 are whole latent frames; 3-4 is not
        assert keep.any((1, 2)).tolist() == [True, True, False]
        other = pipeline.generate(2, seed=9, keep=keep, tokens=made.tokens[0])
        assert other.images is not None
        assert (other.images[:, :3] == made.images[:, :3]).all()
        assert (other.tokens != made.tokens).any()
        both = pipeline.keep_mask(keep_frames=1, keep="left")
        assert both[0].all()
        assert (both[1] == both[2]).all()
        assert both[1, :, 0].all()
        assert not both[1, :, -1].any()
        for frames in (0, 6, "x"):
            with pytest.raises(RequestError, match="keep_frames"):
                pipeline.keep_mask(keep_frames=frames)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["gif", "webp", "apng", "mp4"])
def test_generate_redo_edit(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    out = tmp_path / f"clips.{ending}"
    assert generate.main([str(tiny), "--label", "0", "2", "--seed", "1", "--scale", "8", "--out", str(out)]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert redo.main([str(out), "--bundle", str(tiny)]) == 0
    assert "identical: 2 clips of 5 frames, 384 tokens drawn" in capsys.readouterr().out
    command = [str(out), "--bundle", str(tiny), "--which", "1", "--keep-frames", "3", "--seed", "5", "--json"]
    assert edit.main([*command, "--out", str(tmp_path / f"next.{ending}")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["kept_tokens"], row["tokens"], row["frames"], row["label"]) == (128, 192, 5, 2)
    assert redo.main([str(tmp_path / f"next.{ending}"), "--bundle", str(tiny)]) == 0


def test_clips_that_come_out_otherwise_say_where_and_on_what(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "clip.gif", Pipeline.generate
    here = ["--device", "cpu", "--quiet"]
    assert generate.main([str(tiny), "--label", "0", "--seed", "1", "--out", str(out), *here]) == 0

    def otherwise(self: Pipeline, *given: Any, **how: Any) -> Result:
        made = real(self, *given, **how)
        made.tokens[0, 7] ^= 1
        return made

    monkeypatch.setattr(Pipeline, "generate", otherwise)
    capsys.readouterr()
    assert redo.main([str(out), "--bundle", str(tiny), *here]) == 1
    said = capsys.readouterr().out
    assert "first differs at token 7; 1 of all 192 tokens differ (on " in said
    assert said.endswith(" then and now; another CPU or GPU may round otherwise, or the file's entry was changed)\n")


@pytest.mark.parametrize(
    ("ending", "levels", "code", "text"),
    [
        ("apng", 1, 0, "identical: 1 clip of 5 frames, 192 tokens drawn, pixels differ by up to 1 of 255, "),
        ("apng", 9, 1, "different: the tokens are the same, the pixels are not (pixels differ by up to 9 of 255, "),
        ("webp", 9, 1, "different: the tokens are the same, the pixels are not (pixels differ by up to 9 of 255, "),
        ("gif", 9, 0, "identical: 1 clip of 5 frames, 192 tokens drawn, pixels as the file keeps them ("),
    ],
)
def test_clips_that_another_decoder_made_are_not_the_files_fault(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, levels: int, code: int, text: str
) -> None:
    with Pipeline.load(tiny, "cpu") as pipeline:
        made = pipeline.generate(0, seed=1)
    assert made.images is not None
    assert made.made_on is not None
    images = made.images.copy()
    pixel = images[0, 0, 0, 0].astype(int)
    images[0, 0, 0, 0] = np.where(pixel > 99, pixel - levels, pixel + levels)
    other = replace(made, images=images, made_on=replace(made.made_on, decoder="another"))
    other.save(tmp_path / f"clip.{ending}")
    assert redo.main([str(tmp_path / f"clip.{ending}"), "--bundle", str(tiny), "--device", "cpu", "--quiet"]) == code
    said = capsys.readouterr().out
    assert text in said
    assert f"; decoded by another then, by {made.made_on.decoder} now" in said


@pytest.mark.parametrize(
    ("given", "shape"), [([], "(0,) and type float64"), (None, "() and type object"), ("abc", "() and type <U3")]
)
def test_what_is_no_tokens_is_named_as_given(tiny: Path, given: Any, shape: str) -> None:
    tokenizer = Tokenizer(Bundle.open(tiny), 1)
    with pytest.raises(RequestError) as error:
        tokenizer.decode(given)
    assert str(error.value).startswith(f"tokens have shape {shape}; expected integers [192] or [B,192] in sequence ")
    tokenizer.close()


def test_a_picture_begins_to_move(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    command = [str(picture), "--bundle", str(tiny), "--label", "1", "--out", str(tmp_path / "out.gif")]
    assert edit.main([*command, "--keep-frames", "1"]) == 0
    assert edit.main([*command, "--keep-frames", "3"]) == 2
    assert "has 1 frames, and tokens of the first 3 would stay; keep fewer" in capsys.readouterr().err


def test_what_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is made for what cannot be written.
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("it was checked too late"))

    def refused(verb: object, *arguments: str) -> str:
        assert verb.main(list(arguments)) == 2  # type: ignore[attr-defined]
        return capsys.readouterr().err

    assert "ends in .gif" in refused(generate, str(tiny), "--label", "0", "--out", str(tmp_path / "x.jpg"))
    assert "1 to 60" in refused(generate, str(tiny), "--label", "0", "--out", str(tmp_path / "x.webp"), "--fps", "0")
    for where in (["--out-dir", str(tmp_path / "folder")], ["--out", str(tmp_path / "x.gif")], []):
        assert "1 to 50" in refused(generate, str(tiny), "--label", "0", "--fps", "60", *where)  # before any work
    assert not (tmp_path / "folder").exists()
    monkeypatch.setitem(sys.modules, "av", None)
    assert "MP4 needs PyAV" in refused(generate, str(tiny), "--label", "0", "--out", str(tmp_path / "x.mp4"))
    clip = tmp_path / "clip.webp"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", GENERATE)
        assert generate.main([str(tiny), "--label", "0", "--out", str(clip), "--quiet"]) == 0
    with_bundle = [str(clip), "--bundle", str(tiny)]
    assert "nothing says what stays" in refused(edit, *with_bundle)
    assert "are for images" in refused(edit, *with_bundle, "--place", "0,0,4,4")
    folder = tmp_path / "a.gif"
    folder.mkdir()
    why = refused(generate, str(tiny), "--label", "0", "--out", str(folder))
    assert "a.gif" in why
    assert "path" not in why
    assert "all 192 tokens stay" in refused(edit, *with_bundle, "--keep-frames", "5")
    demo = str(Path(__file__).parents[2] / "models/demo")
    picture = str(Path(__file__).parents[2] / "docs/demo.png")
    assert "images, not clips" in refused(generate, demo, "--label", "0", "--fps", "8")
    assert "images, not clips" in refused(edit, picture, "--bundle", demo, "--keep-frames", "2", "--label", "0")
    Image.new("RGB", (16, 16)).save(tmp_path / "other.png")
    short = tmp_path / "short.gif"
    write_frames(short, np.arange(2, dtype=np.uint8).repeat(768).reshape(2, 16, 16, 3) * 99, 8)
    why = refused(reconstruct, str(short), "--bundle", str(tiny), "--out", str(tmp_path / "r.gif"))
    assert "short.gif: has 2 frames; expected a clip of 5 or more" in why
    with_bundle = [str(clip), "--bundle", str(tiny), "--out"]
    assert "ends in .gif" in refused(reconstruct, *with_bundle, str(tmp_path / "r.jpg"))
    assert "is the file that is read" in refused(reconstruct, *with_bundle, str(clip))
    assert "1 to 50" in refused(reconstruct, *with_bundle, str(tmp_path / "r.gif"), "--fps", "51")
    assert "has no 'parvis' entry" in refused(redo, str(tmp_path / "other.png"), "--bundle", str(tiny))


def test_the_bytes_of_a_clip(tiny: Path, tmp_path: Path) -> None:
    with Pipeline.load(tiny) as pipeline:
        made = pipeline.generate([0, 1], seed=1)
    for kind in (".gif", ".webp", ".apng"):
        made.save(tmp_path / f"a{kind}", fps=5, scale=2)
        assert made.to_bytes(kind, fps=5, scale=2) == (tmp_path / f"a{kind}").read_bytes()
    assert made.to_bytes() == made.to_bytes(".gif")
    with pytest.raises(
        RequestError, match=r"kind '.jpg': expected \.gif or \.webp or \.apng or \.png or \.mp4, the ending"
    ):
        made.to_bytes(".jpg")


def test_a_recipe_of_other_clips_is_damaged(tiny: Path) -> None:
    with Pipeline.load(tiny) as pipeline:
        made, bundle = pipeline.generate([0], seed=1), pipeline.bundle
    whole = Recipe(bundle.name, bundle.hash, 1, [0], [None], [1], made.settings, made.tokens, fps=8.0, frames=5)
    check_recipe(whole, bundle, "a.gif")
    for change, what in (
        ({"frames": 9}, "it is of clips of 9 frames, the bundle makes clips of 5 frames"),
        ({"fps": None, "frames": 1}, "it is of images, the bundle makes clips of 5 frames"),
    ):
        with pytest.raises(RequestError, match=f"a.gif: its 'parvis' entry is damaged: {what}; give an undamaged copy"):
            check_recipe(replace(whole, **change), bundle, "a.gif")


def test_a_clip_through_the_tokenizer_and_back(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sheet of parvis is taken clip by clip, any other file as one clip."""
    sheet, other, out, tokens = (tmp_path / name for name in ("sheet.webp", "other.gif", "r.apng", "t.npy"))
    with Pipeline.load(tiny) as pipeline:
        made = pipeline.generate([0, 1], seed=5)
        made.save(sheet, scale=2)
        assert made.images is not None
        frames = np.concatenate([made.images[1], made.images[0]])[:7].repeat(3, 1).repeat(3, 2)  # longer and larger
        write_frames(other, frames, 8)
        encoded = pipeline.encode(made.images)
        again = pipeline.decode(encoded)
    given = [str(sheet), str(other), "--bundle", str(tiny), "--out", str(out), "--tokens", str(tokens)]
    assert reconstruct.main([*given, "--beside", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in row["images"]] == [f"{sheet} (0)", f"{sheet} (1)", str(other)]
    assert row["images"][1]["psnr_db"] == pytest.approx(psnr_db(made.images[1], again[1]))
    np.testing.assert_array_equal(np.load(tokens)[:2], encoded)
    shown = read_any(out, 5).frames
    assert shown.shape == (5, 16, 96, 3)  # three clips of 16x32, without an empty place
    np.testing.assert_array_equal(shown[:, :16, :16], made.images[0])
    np.testing.assert_array_equal(shown[:, :16, 16:32], again[0])
    longer = tmp_path / "longer.webp"  # clips of another bundle's length: each by itself, its first frames
    recipe = read_any(sheet, 5).recipe
    assert recipe is not None
    more = np.concatenate([made.images, made.images[:, ::-1]], axis=1)
    longer.write_bytes(content(longer, recipe, more))
    assert reconstruct.main([str(longer), "--bundle", str(tiny), "--out", str(out), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in row["images"]] == [f"{longer} (0)", f"{longer} (1)"]
    assert row["images"][1]["psnr_db"] == pytest.approx(psnr_db(made.images[1], again[1]))
    longer.write_bytes(content(longer, recipe, made.images[:, :3]))
    assert reconstruct.main([str(longer), "--bundle", str(tiny), "--out", str(out)]) == 2
    assert "longer.webp: has 3 frames; expected a clip of 5 or more" in capsys.readouterr().err
    assert reconstruct.main([str(sheet), "--bundle", str(tiny), "--out", str(out)]) == 0
    assert f"{sheet} (0): 5 frames of 16x16 pixels in 192 tokens, " in capsys.readouterr().out


def test_a_photo_begins_to_move(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any format of pictures, not only in those that a clip can have too."""
    for name in ("photo.jpg", "photo.bmp", "photo.tif"):
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
        command = [str(tmp_path / name), "--bundle", str(tiny), "--keep-frames", "1", "--label", "1", "--seed", "3"]
        assert edit.main([*command, "--out", str(tmp_path / "moves.webp")]) == 0
        assert "1 clip of 1, seed 3, 64 of 192 tokens kept, in" in capsys.readouterr().out
        assert (read_any(tmp_path / "moves.webp", 5).frames.shape) == (5, 16, 16, 3)


def test_edit_says_what_it_took_and_keeps_the_speed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = tmp_path / "clip.webp", tmp_path / "next.webp"
    assert generate.main([str(tiny), "--label", "1", "--seed", "4", "--fps", "20", "--out", str(clip)]) == 0
    command = ["--bundle", str(tiny), "--seed", "1", "--out", str(out)]
    capsys.readouterr()
    assert edit.main([str(clip), *command, "--keep-frames", "3", "--count", "2"]) == 0
    printed = capsys.readouterr()
    assert ": 2 clips of 1, seeds 1..2, 128 of 192 tokens kept as they were generated, in" in printed.out
    assert not printed.err
    made = read_any(out, 5).recipe
    assert made is not None
    assert made.fps == 20
    assert edit.main([str(clip), *command, "--keep-frames", "4", "--quiet"]) == 0
    assert not capsys.readouterr().err
    assert edit.main([str(clip), *command, "--keep-frames", "4"]) == 0
    assert "--keep-frames 4: 3 frames stay; behind the first one they stay 2 at a time, so the next number is 5" in (
        capsys.readouterr().err
    )
    recipe, frames = read_any(clip, 5).recipe, read_any(clip, 5).frames.copy()
    assert recipe is not None
    painted = tmp_path / "painted.webp"
    frames[1, :4] = 255
    text = json.dumps(entry(recipe))
    painted.write_bytes(as_webp(frames, 1, 20, text))  # another program kept the metadata
    assert edit.main([str(painted), *command, "--keep-frames", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["encoded"]
    assert row["encoded_because"] == f"the pixels of {painted} were changed since parvis wrote it"
    assert row["timings_ms"]["calls"] > 0
    assert edit.main([str(painted), *command, "--keep-frames", "1"]) == 0
    assert "were changed since parvis wrote it; encoding its pixels" in capsys.readouterr().err


def test_clips_given_to_a_bundle_of_images(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = str(Path(__file__).parents[2] / "models/demo")
    for ending in ("gif", "webp", "apng"):
        clip = tmp_path / f"clip.{ending}"
        assert generate.main([str(tiny), "--label", "0", "--out", str(clip), "--quiet"]) == 0
        assert redo.main([str(clip), "--bundle", demo]) == 2
        assert f"{clip}: holds clips, and {demo} makes images; give the --bundle that made" in capsys.readouterr().err


def test_a_mask_of_a_clip_is_an_input(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not written over, and what marks the region can be said."""
    clip, mask, grey = tmp_path / "clip.webp", tmp_path / "mask.png", tmp_path / "grey.png"
    assert generate.main([str(tiny), "--label", "0", "--out", str(clip), "--quiet"]) == 0
    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    Image.fromarray(half).save(mask)
    colours = np.array([[[255, 255, 255]] * 8 + [[200, 20, 20]] * 8] * 16, np.uint8)  # is the red part white?
    Image.fromarray(colours).save(grey)
    other = tmp_path / "mask.npy"
    other.write_bytes(mask.read_bytes())
    command = [str(clip), "--bundle", str(tiny), "--label", "0", "--seed", "1"]
    out = ["--out", str(tmp_path / "r.webp")]
    for given, option in (
        (["--keep", str(mask), "--out", str(mask)], "--out"),
        (["--change", str(mask), "--out", str(mask)], "--out"),
        (["--keep", str(other), *out, "--tokens", str(other)], "--tokens"),
    ):
        assert edit.main([*command, *given]) == 2
        assert f"{option} {given[1]} is the file that is read; give another name" in capsys.readouterr().err
    assert mask.read_bytes() == other.read_bytes()
    assert edit.main([*command, "--keep", str(grey), *out]) == 2
    assert "--mask-from" in capsys.readouterr().err
    assert edit.main([*command, "--keep", str(grey), *out, "--mask-from", "brightness"]) == 0
    assert edit.main([*command, "--keep", str(mask), *out]) == 0


def test_images_given_to_a_bundle_of_clips(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.png"
    demo = Path(__file__).parents[2] / "models/demo"
    assert generate.main([str(demo), "--label", "0", "--out", str(image), "--quiet"]) == 0
    assert redo.main([str(image), "--bundle", str(tiny)]) == 2
    assert f"{image}: holds images, and {tiny} makes clips; give the --bundle that made them" in capsys.readouterr().err
    clip = tmp_path / "clip.gif"
    assert generate.main([str(tiny), "--label", "0", "--out", str(clip), "--quiet"]) == 0
    capsys.readouterr()
    assert reconstruct.main([str(clip), "--bundle", str(demo), "--out", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().err == f"parvis: {clip}: moves; its first frame is taken, as a picture\n"
    assert reconstruct.main([str(image), "--bundle", str(demo), "--out", str(tmp_path / "b.png")]) == 0
    assert not capsys.readouterr().err
    keep = ["--keep", "left", "--label", "0", "--out", str(tmp_path / "c.png")]
    assert edit.main([str(clip), "--bundle", str(demo), *keep]) == 0
    assert "its first frame is taken, as a picture" in capsys.readouterr().err


def test_the_beginnings_that_can_be_decoded_are_named(tiny: Path) -> None:
    with Pipeline.load(tiny) as pipeline, pytest.raises(RequestError) as error:
        pipeline.decode(np.zeros((1, 63), np.int64))
    assert str(error.value).startswith(
        "tokens have shape (1, 63); expected [B,192] in sequence order, or the first 64, 128"
    )


def test_sheets_of_clips_have_no_empty_place_if_that_is_not_too_wide() -> None:
    assert [default_columns(count, True) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 25, 26)] == (
        [1, 2, 3, 2, 5, 3, 3, 4, 3, 5, 4, 4, 5, 6]
    )
    assert default_columns(10) == 4
