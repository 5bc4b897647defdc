"""``parvis generate`` and ``parvis redo``: what they write, under which names, and that an image can be made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from PIL import Image

from par_runtime import Pipeline, Result
from par_runtime.images import png


def test_generate_writes_a_sheet_and_tokens(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, tokens = tmp_path / "new" / "a.png", tmp_path / "t.npy"
    assert run("generate", tiny, "--label", "otter", "--count", 5, "--seed", 1, "--out", out, "--tokens", tokens) == 0
    with Image.open(out) as image:
        assert image.size == (3 * 16, 2 * 16)
    assert np.load(tokens).shape == (5, 64)
    assert "5 images" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "new", "t.npy"]


def test_twice_the_same_pixels_and_one_by_one_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(
            "generate",
            tiny,
            "--label",
            1,
            "--count",
            8,
            "--seed",
            1,
            "--out",
            tmp_path / f"{name}.png",
            "--tokens",
            tmp_path / f"{name}.npy",
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    batch = np.load(tmp_path / "a.npy")
    for i in range(8):
        run("generate", tiny, "--label", 1, "--seed", 1 + i, "--tokens", tmp_path / "one.npy")
        assert (np.load(tmp_path / "one.npy")[0] == batch[i]).all()


def test_redo_proves_a_png_and_notices_a_change(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    run(
        "generate",
        tiny,
        "--label",
        0,
        "--label",
        3,
        "--count",
        2,
        "--seed",
        9,
        "--guidance",
        1,
        3,
        "--top-k",
        20,
        "--out",
        out,
    )
    assert run("redo", out, "--bundle", tiny, "--out", tmp_path / "again.png") == 0
    assert "identical: 8 images" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    with Image.open(out) as image:
        image.load()
        chunk = image.text["parvis"]  # type: ignore[attr-defined]
        info = png.PngImagePlugin.PngInfo()
        info.add_itxt("parvis", chunk)
        image.putpixel((3, 3), (1, 2, 3))
        image.save(tmp_path / "touched.png", pnginfo=info)
    assert run("redo", tmp_path / "touched.png", "--bundle", tiny) == 1
    assert "the tokens are the same, the pixels are not (1 pixels" in capsys.readouterr().out


def test_redo_reports_the_first_other_token(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", tiny, "--label", 0, "--seed", 9, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        entry = json.loads(image.text["parvis"])  # type: ignore[attr-defined]
        entry["images"][0]["seed"] = 10
        info = png.PngImagePlugin.PngInfo()
        info.add_itxt("parvis", json.dumps(entry))
        image.save(tmp_path / "a.png", pnginfo=info)
    assert run("redo", tmp_path / "a.png", "--bundle", tiny) == 1
    assert "first differs at token 1: " in capsys.readouterr().out


def test_one_file_per_image_and_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("generate", tiny, "--label", "sea otter", "--count", 2, "--seed", 4, "--out-dir", tmp_path, "--json") == 0
    )
    row = json.loads(capsys.readouterr().out)
    assert [Path(p).name for p in row["written"]] == ["sea-otter-4.png", "sea-otter-5.png"]
    assert row["seeds"] == [4, 5]
    for path in row["written"]:
        assert run("redo", path, "--bundle", tiny, "--quiet") == 0


def test_scales_that_are_nearly_the_same_have_files_of_their_own(tiny: Path, tmp_path: Path) -> None:
    assert (
        run("generate", tiny, "--label", 0, "--seed", 1, "--guidance", 1.5, 1.50000001, 2, "--out-dir", tmp_path) == 0
    )
    names = ["red-fox-1-g1.5.png", "red-fox-1-g1.50000001.png", "red-fox-1-g2.0.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_previews_fill_towards_the_image(tiny: Path, tmp_path: Path) -> None:
    run("generate", tiny, "--label", 0, "--seed", 1, "--preview-every", 6, "--out", tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-0006.png", "x-0012.png", "x-0018.png", "x.png"]


def test_all_labels(tiny: Path, tmp_path: Path) -> None:
    run("generate", tiny, "--label", "all", "--label", "otter", "--seed", 1, "--tokens", tmp_path / "t.npy")
    assert np.load(tmp_path / "t.npy").shape == (7, 64)


def test_another_bundle_cannot_redo(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from par_runtime.bundle import seal

    run("generate", tiny, "--label", 0, "--seed", 9, "--out", tmp_path / "a.png")
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(seal(manifest | {"name": "other"})))
    assert run("redo", tmp_path / "a.png", "--bundle", other) == 2
    assert "give --bundle with the one that made it" in capsys.readouterr().err


def test_without_an_output_the_sheet_is_named_after_what_it_shows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("generate", tiny, "--label", "sea otter", "--count", 2, "--seed", 4) == 0
    assert capsys.readouterr().out.startswith("tiny-sea-otter-4.png: 2 images, seeds 4..5, in ")
    assert run("generate", tiny, "--label", "all", "--seed", 4, "--quiet") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-6-classes-4.png", "tiny-sea-otter-4.png"]


def test_a_sheet_whose_entry_is_larger_than_a_megabyte_can_be_read(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    pipeline = Pipeline.load(tiny, threads=1)
    r = pipeline.generate([0], seed=1)
    assert r.images is not None
    many = 4000
    big = Result(
        pipeline.bundle,
        np.repeat(r.images, many, 0),
        np.repeat(r.tokens, many, 0),
        r.labels * many,
        r.seeds * many,
        r.settings * many,
        {},
    )
    big.save(out, 80)
    recipe, pixels = png.read(out)
    assert recipe.tokens.shape == (many, 64)
    assert (pixels == png.sheet(big.images, 80)).all()  # type: ignore[arg-type]
