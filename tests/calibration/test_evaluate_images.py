"""``parvis evaluate``: generated images and samples beside held-out ones, which images they are, and the sheet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import (
    NAMES,
    SMALL,
    TINY,
    clip_folder,
    ending_at_tokens,
    evaluated,
    samples,
    sheet_rows,
    without_encoder,
)
from recipe_scripts import raw_folder

from par_calibration import heldout
from par_calibration.evaluate import distances
from par_calibration.evaluate.distances import spread
from par_calibration.report import frechet
from par_runtime import Pipeline, Settings
from par_runtime.bundle import Bundle

LABELS = [i % 6 for i in range(24)]
SETTINGS = ("guidance", "temperature", "top_k", "top_p")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def images(pipeline: Pipeline) -> np.ndarray:
    made = pipeline.generate(LABELS, seed=7, temperature=0.5).images
    assert made is not None
    return made


@pytest.fixture(scope="module")
def real(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in the raw form; the classes take turns already."""
    return raw_folder(tmp_path_factory.mktemp("real") / "raw", images, np.array(LABELS), NAMES)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "DRAWS", 10)


def test_generated_images_are_those_of_the_pipeline_for_every_combination_of_settings(
    pipeline: Pipeline, images: np.ndarray, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists: dict[str, list[float]] = {"guidance": [3, 1], "temperature": [1], "top_k": [0, 5], "top_p": [0.9, 0.5]}
    given = ["--guidance", "3", "1", "--temperature", "1", "--top-k", "5,0", "--top-p", "0.9", "--top-p", "0.5"]
    command = [TINY, "--real", real, *given, "--generated", "18", "--seed", "40", "--shown", "5", "--batch", "7"]
    found = evaluated(capsys, *command, "--sheet", tmp_path / "new" / "sheet.png")
    rows = sheet_rows(tmp_path / "new" / "sheet.png", 9, 5)
    np.testing.assert_array_equal(rows[0], images[:5])
    compared = found["comparison"]
    assert [tuple(one["settings"][name] for name in SETTINGS) for one in compared["sets"]] == list(
        product(*lists.values())  # whole numbers ascend, others stay as they were given
    )
    encoder = frechet.Features(pipeline.bundle, 1)
    whole = spread(distances.Features(encoder.of(images), np.array(LABELS)))
    assert whole is not None
    for one, row in zip(compared["sets"], rows[1:], strict=True):
        settings = Settings(**one["settings"])
        made = pipeline.generate(LABELS[:18], settings, seeds=range(40, 58)).images
        assert made is not None
        np.testing.assert_array_equal(row, made[:5])
        own = spread(distances.Features(encoder.of(made), np.array(LABELS[:18])))
        assert own is not None
        assert one["spread"] == pytest.approx(own / whole)
        assert (one["images"], one["name"]) == (18, str(TINY))
        assert one["margin"] > 0
    assert len({row.tobytes() for row in rows}) == 9
    assert (compared["compared"], compared["held_out"], compared["chance"]["spread"]) == (8, 24, 1)
    assert (compared["features"], compared["features_of"]) == (frechet.FEATURES, str(TINY))
    assert compared["pixels"] == "the pictures"


def test_by_default_there_are_as_many_images_as_real_ones_with_the_bundles_settings_and_seed_0(
    pipeline: Pipeline, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (TINY, SMALL, "--real", real, "--shown", "99", "--sheet", tmp_path / "sheet.png")
    found = evaluated(capsys, *command)
    rows = sheet_rows(tmp_path / "sheet.png", 3, 24)
    np.testing.assert_array_equal(rows[1], pipeline.generate(LABELS, seed=0).images)
    assert (rows[2] != rows[1]).any()  # of the other bundle
    sets = found["comparison"]["sets"]
    assert [one["name"] for one in sets] == [str(TINY), str(SMALL)]
    assert all(one["settings"] == vars(pipeline.bundle.defaults) | {"greedy": False} for one in sets)
    assert found["seed"] == 0
    assert evaluated(capsys, *command) == found  # nothing is left to chance


def test_the_seeds_go_on_with_0_behind_the_largest_and_no_more_are_made_at_once_than_asked_for(
    pipeline: Pipeline, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet, made_at_once, generate = tmp_path / "sheet.png", [], Pipeline.generate

    def spied(self: Pipeline, labels: list[int], *given: Any, **more: Any) -> Any:
        made_at_once.append((len(labels), more["max_batch"]))
        return generate(self, labels, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", spied)
        options = ["--generated", "30", "--seed", 2**64 - 4, "--shown", "30", "--sheet", sheet, "--batch", "13"]
        evaluated(capsys, TINY, "--real", real, *options)
    assert made_at_once == [(13, 13), (13, 13), (4, 13)]
    made = pipeline.generate([i % 6 for i in range(30)], seeds=[*range(2**64 - 4, 2**64), *range(26)]).images
    rows = sheet_rows(sheet, 2, 30)
    np.testing.assert_array_equal(rows[1], made)
    assert (rows[0, 24:] == 255).all()  # there are 24 held-out images; the rest of their row is white


def test_classes_restrict_likelihood_tokenizer_and_images(
    pipeline: Pipeline, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = np.concatenate([images, images[::-1]])
    labels = np.concatenate([LABELS, LABELS[::-1]])
    folder = raw_folder(tmp_path / "raw", twice, labels, NAMES)
    file = samples(pipeline, tmp_path / "s.npz", 60, seed=1)
    with np.load(file) as stored:
        chosen = np.isin(stored["arr_1"], [4, 1])
        of_file = stored["arr_0"][chosen]
    command = [TINY, "--real", folder, "--label", "Grey Whale", "1", "--samples", file, "--generated", "17"]
    found = evaluated(capsys, *command, "--held-out", "15")
    # --held-out counts those of the classes
    assert found["notes"] == ["No images are compared: it takes 16 held-out ones, and there are 15."]
    found = evaluated(capsys, *command, "--held-out", "99", "--sheet", tmp_path / "a.png", "--shown", "99")
    own = np.isin(labels, [4, 1])
    in_turns = np.argsort(np.array([list(labels[:i]).count(labels[i]) for i in range(48)])[own], kind="stable")
    held, classes = twice[own][in_turns], labels[own][in_turns]
    rows = sheet_rows(tmp_path / "a.png", 3, max(17, len(of_file)))
    np.testing.assert_array_equal(rows[0, :16], held)
    made = pipeline.generate([1, 4] * 8 + [4], seed=0).images  # nine and eight, as 17 of two equal shares are
    np.testing.assert_array_equal(rows[1, :17], made)
    np.testing.assert_array_equal(rows[2, : len(of_file)], of_file)
    assert [one["images"] for one in found["comparison"]["sets"]] == [17, len(of_file)]
    assert 17 < len(of_file) < 60
    assert list(found["likelihoods"][0]["classes"]) == ["arctic fox", "grey whale"]
    nats = -pipeline.score(pipeline.encode(held), classes.tolist()).mean()
    assert found["likelihoods"][0]["nats"] == pytest.approx(nats, abs=1e-5)
    assert (found["likelihoods"][0]["images"], found["kept"][0]["images"]) == (16, 16)


def test_held_out_tokens_are_compared_as_the_decoder_makes_them(
    pipeline: Pipeline, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, full = without_encoder(tmp_path / "bare"), shutil.copytree(TINY, tmp_path / "full")
    tokens = pipeline.encode(images)
    heldout.attach(Bundle.open(bare), tokens, LABELS)
    command = ("--sheet", tmp_path / "a.png", "--shown", "24", "--generated", "16")
    found = evaluated(capsys, bare, "--features-of", TINY, *command)
    assert found["comparison"]["pixels"] == "what the decoder makes of their tokens"
    assert found["comparison"]["features_of"] == str(TINY)
    np.testing.assert_array_equal(sheet_rows(tmp_path / "a.png", 2, 24)[0], pipeline.decode(tokens))
    # Features are those of the encoder, whoever decodes the tokens; that of a second bundle serves without the option.
    heldout.attach(Bundle.open(full), tokens, LABELS)
    beside = evaluated(capsys, bare, full, "--generated", "16")["comparison"]
    assert beside["features_of"] == str(full)
    assert [one | {"name": ""} for one in beside["sets"]] == [found["comparison"]["sets"][0] | {"name": ""}] * 2
    assert beside["chance"] == found["comparison"]["chance"]
    # Without an encoder there are no features, and the likelihood is measured all the same.
    alone = evaluated(capsys, bare)
    assert (alone["comparison"], len(alone["likelihoods"])) == (None, 1)
    assert alone["notes"] == [
        "No images are compared: no bundle has an encoder, which gives the features; --features-of names one."
    ]
    # In another order: the first one has nothing to compare with when its turn comes.
    found = evaluated(capsys, TINY, full, "--generated", "16")
    assert [one["name"] for one in found["comparison"]["sets"]] == [str(full)]
    assert f"Images of {TINY} are not compared: it holds none to compare with." in found["notes"][1]


def test_a_bundle_that_ends_at_tokens_has_a_likelihood_and_no_images_wherever_it_stands(
    pipeline: Pipeline, images: np.ndarray, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens, codes = ending_at_tokens(tmp_path / "tokens"), tmp_path / "codes.npz"
    heldout.write(codes, pipeline.encode(images), LABELS)
    alone = evaluated(capsys, TINY, "--real", codes)["comparison"]
    for order in ((TINY, tokens), (tokens, TINY)):
        found = evaluated(capsys, *order, "--real", codes)
        assert [each["change"] for each in found["likelihoods"]] == [None, 0]
        assert found["comparison"] == alone
        assert found["notes"] == [f"{tokens} ends at tokens, so no images of it are compared."]
        pictures = evaluated(capsys, *order, "--real", real, "--generated", "0")
        assert [each["bundle"] for each in pictures["likelihoods"]] == [str(TINY)]
        assert pictures["notes"] == [f"{tokens} has no encoder for pictures, so their likelihood is not measured."]
    none = evaluated(capsys, tokens, "--real", codes)
    assert (none["comparison"], len(none["likelihoods"])) == (None, 1)
    assert none["notes"] == [f"{tokens} ends at tokens, so no images are compared."]


def test_a_video_bundle_compares_clips_and_shows_the_frames_in_their_middle(
    tiny_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Pipeline.load(tiny_video, "cpu", threads=1, selftest=False) as loaded:
        labels = [i % 3 for i in range(18)]
        made = loaded.generate(labels, seed=3).images
        file = samples(loaded, tmp_path / "s.npz", 18, seed=3, labels="balanced")
    assert made is not None
    clips = np.random.default_rng(0).integers(256, size=made.shape, dtype=np.uint8)
    folder = clip_folder(tmp_path / "clips", clips, labels, ["0", "1", "2"])
    sheet = tmp_path / "a.png"
    command = [tiny_video, "--real", folder, "--samples", file, "--generated", "18", "--seed", "3", "--sheet", sheet]
    found = evaluated(capsys, *command, "--shown", "4")
    rows = sheet_rows(sheet, 3, 4)
    np.testing.assert_array_equal(rows[0], clips[:4, 2])
    np.testing.assert_array_equal(rows[1], made[:4, 2])
    np.testing.assert_array_equal(rows[2], made[:4, 2])
    now, stored = found["comparison"]["sets"]
    assert now == stored | {"name": str(tiny_video)}
    assert now["distance"] > now["margin"]  # noise is no clip of the bundle
    assert found["comparison"]["features"] == frechet.CLIP_FEATURES


def test_numbers_that_are_not_finite_are_null(
    real: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frechet.Features, "of", lambda _, images: np.full((len(images), 4), np.nan))
    (one,) = evaluated(capsys, TINY, "--real", real, "--generated", "16")["comparison"]["sets"]
    assert (one["distance"], one["margin"]) == (None, None)
