"""``parvis evaluate --samples``: files of ``parvis sample`` beside held-out images, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import NAMES, TINY, doctored, evaluated, samples, sheet_rows, shown
from recipe_scripts import raw_folder

from par_calibration.evaluate import distances
from par_calibration.evaluate.samples import about_samples, of_samples, settings_of
from par_runtime import Pipeline, Settings
from par_runtime.errors import RequestError

LABELS = [i % 6 for i in range(24)]


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def real(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in the raw form."""
    made = pipeline.generate(LABELS, seed=7, temperature=0.5).images
    assert made is not None
    return raw_folder(tmp_path_factory.mktemp("real") / "raw", made, np.array(LABELS), NAMES)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "DRAWS", 10)


def test_samples_are_named_with_their_settings_and_measured_as_the_same_images_made_now(
    pipeline: Pipeline, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = samples(pipeline, tmp_path / "s.npz", 24, labels="balanced", seed=9, guidance=2, top_p=0.5)
    alone = evaluated(capsys, TINY, "--real", real, "--samples", file, "--seed", "9", "--sheet", tmp_path / "a.png")
    (stored,) = alone["comparison"]["sets"]
    assert (stored["name"], stored["images"]) == (str(file), 24)
    assert stored["settings"] == vars(Settings(2.0, 1.0, 0, 0.5))
    both = ("--generated", "24", "--guidance", "2", "--top-p", "0.5", "--seed", "9")
    made, again = evaluated(capsys, TINY, "--real", real, "--samples", file, *both)["comparison"]["sets"]
    assert again == stored
    assert made == stored | {"name": str(TINY)}
    rows = sheet_rows(tmp_path / "a.png", 2, 12)
    np.testing.assert_array_equal(rows[1], pipeline.generate(LABELS, seed=9, guidance=2, top_p=0.5).images[:12])


def test_the_table_of_images_says_what_the_numbers_are(
    pipeline: Pipeline, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = samples(pipeline, tmp_path / "greedy.npz", 17, greedy=True)
    unknown = doctored(greedy, tmp_path / "unknown.npz", settings=None)
    command = [TINY, "--real", real, "--samples", greedy, unknown, "--generated", "16", "--top-k", "3"]
    compared = evaluated(capsys, *command)["comparison"]
    lines = [" ".join(line.split()) for line in shown(capsys, *command)]
    assert lines[2] == f"{TINY}: 16 images, guidance 1.5, temperature 1, top-k 3, top-p 1"
    at = next(i for i, line in enumerate(lines) if line.startswith("Images beside the held-out ones"))
    assert f"in features of {TINY} " in lines[at]
    assert "Means of 100 draws of 8 images of both sides, without what few images add" in lines[at + 1]
    assert "The held-out ones are the pictures." in lines[at + 1]
    rows = lines[at + 3 :]

    def numbers(one: dict[str, Any]) -> str:
        return f"{one['distance']:.4f} +- {one['margin']:.4f} {one['spread']:.2f}"

    of_sets = [numbers(one) for one in compared["sets"]]
    assert rows == [
        f"held-out 24 {numbers(compared['chance'])}",
        f"{TINY} 1.5 1 3 1 16 {of_sets[0]}",
        f"{greedy} 1.5 greedy 17 {of_sets[1]}",
        f"{unknown} 17 {of_sets[2]}",
    ]


@pytest.mark.parametrize(
    "settings",
    [None, [1], "fast", {"guidance": "x"}, {"top_p": {"a": 1}}, {"top_p": 7}, {"heat": 1}, {"guidance": None}],
)
def test_settings_that_are_none_are_left_out(pipeline: Pipeline, settings: object) -> None:
    """They come from a file, and a table of them is printed after all of the work."""
    assert settings_of({"settings": settings}, pipeline.bundle) is None
    assert settings_of({"settings": {"top_p": 0.5}}, pipeline.bundle) == Settings(top_p=0.5)


def test_samples_are_read_in_parts_with_the_classes_of_their_seeds(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("par_runtime.samples.reading.BLOCK", 5 * 16 * 16 * 3 - 7)  # ends within an image
    file = samples(pipeline, tmp_path / "s.npz", 35, part=(2, 2), seed=2)
    about = about_samples(file, pipeline.bundle, frozenset())
    parts = list(of_samples(file, about))
    assert [len(some) for some, _ in parts] == [4, 5, 5, 4]
    with np.load(file) as stored:
        np.testing.assert_array_equal(np.concatenate([some for some, _ in parts]), stored["arr_0"])
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), stored["arr_1"])
    whole = bytearray(file.read_bytes())
    whole[5000] ^= 1
    file.write_bytes(whole)
    with pytest.raises(RequestError, match=r"or is damaged; give one that it finished .*CRC"):
        list(of_samples(file, about))
    other = samples(pipeline, tmp_path / "other.npz", 18, seed=3)
    with pytest.raises(RequestError, match=r"other\.npz: is another file than before; leave it alone until the end"):
        next(of_samples(other, about))
