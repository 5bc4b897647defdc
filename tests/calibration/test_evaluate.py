"""``parvis evaluate``: how likely held-out images are to bundles, and what their tokenizers keep of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluating import NAMES, SMALL, TINY, clip_folder, evaluated, shown, without_encoder
from recipe_scripts import raw_folder
from video_bundles import write_tiny_video

from par_calibration import heldout
from par_calibration.evaluate.likelihood import Scored, beside_the_first, class_names, scored
from par_calibration.evaluate.run import Request, evaluate
from par_calibration.report import options
from par_calibration.report.measures import interval
from par_runtime import Pipeline, RequestError
from par_runtime.bundle import Bundle
from par_runtime.cli import main as parvis

LABELS = [i % 6 for i in range(24)]
#: The positions of each phase of 64 tokens, 4 at a time.
PHASES = {
    "prefill": slice(0, 1),
    "sequential": slice(1, 4),
    "transition": slice(4, 8),
    "group": slice(8, 64),
}
LIKELIHOOD = ("--generated", "0")


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load(TINY, "cpu", threads=1, selftest=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def images(pipeline: Pipeline) -> np.ndarray:
    made = pipeline.generate(LABELS, seed=7).images
    assert made is not None
    return made


@pytest.fixture(scope="module")
def real(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in the raw form; the classes take turns already."""
    return raw_folder(tmp_path_factory.mktemp("real") / "raw", images, np.array(LABELS), NAMES)


def nats(bundle: Path, tokens: np.ndarray, labels: list[int] = LABELS) -> np.ndarray:
    """[M,N] of tokens in the bundle's own order, by the runtime."""
    with Pipeline.load(bundle, "cpu", threads=1, selftest=False) as loaded:
        return -loaded.score(tokens, labels).astype(np.float64)


def test_nats_and_what_the_tokenizer_keeps_are_those_of_the_pipeline(
    pipeline: Pipeline, images: np.ndarray, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, TINY, "--real", real, *LIKELIHOOD, "--seed", "3")
    tokens = pipeline.encode(images)
    each = nats(TINY, tokens)
    (likelihood,) = found["likelihoods"]
    assert likelihood["nats"] == pytest.approx(each.mean(), abs=1e-5)
    assert (likelihood["low"], likelihood["high"]) == pytest.approx(interval(each.mean(1), 3), abs=1e-5)
    assert likelihood["low"] < likelihood["nats"] < likelihood["high"]
    assert likelihood["phases"] == pytest.approx({name: each[:, at].mean() for name, at in PHASES.items()}, abs=1e-5)
    of_class = {name: each[i::6].mean() for i, name in enumerate(NAMES)}
    assert likelihood["classes"] == pytest.approx(of_class, abs=1e-5)
    assert len(set(likelihood["classes"].values())) == 6
    assert (likelihood["bundle"], likelihood["images_from"]) == (str(TINY), str(real))
    assert (likelihood["n"], likelihood["calls"], likelihood["images"], likelihood["codes"]) == (4, 19, 24, 64)
    assert likelihood["backend"] == pipeline.backend.info.name
    wrong = (pipeline.decode(tokens).astype(float) - images) ** 2
    assert found["kept"] == [
        {
            "bundle": str(TINY),
            "images": 24,
            "psnr": pytest.approx(10 * np.log10(255**2 / wrong.mean())),
            "codes_used": len(set(tokens.ravel().tolist())) / 64,
        }
    ]
    assert 0.1 < found["kept"][0]["codes_used"] < 1
    assert (found["comparison"], found["seed"], found["notes"]) == (None, 3, [])


def test_some_images_at_a_time_give_the_nats_of_all_at_once(
    pipeline: Pipeline, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = heldout.HeldOut(pipeline.encode(images), tuple(LABELS), "here", real=True)
    whole = scored(pipeline, "tiny", held, 0)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Pipeline, "default_batch", 7)
    parts = scored(pipeline, "tiny", held, 0, lambda *now: seen.append(now))
    np.testing.assert_allclose(parts.nats, whole.nats, atol=1e-5)
    assert seen == [(7, 24), (14, 24), (21, 24), (24, 24)]
    one = scored(pipeline, "tiny", held.first(1), 0)
    assert one.likelihood.nats == pytest.approx(whole.nats[0], abs=1e-5)
    assert (one.likelihood.low, one.likelihood.high) == (None, None)  # of one image there is no interval


def test_a_change_is_the_mean_of_the_differences_of_each_image(
    pipeline: Pipeline, images: np.ndarray, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(TINY, tmp_path / "copy")
    found = evaluated(capsys, TINY, copy, SMALL, "--real", real, *LIKELIHOOD, "--seed", "5")
    first, same, other = found["likelihoods"]
    assert (first["change"], first["change_low"], first["change_high"]) == (None, None, None)
    assert (same["change"], same["change_low"], same["change_high"]) == (0, 0, 0)
    assert same["nats"] == first["nats"]
    tokens = pipeline.encode(images)
    difference = (nats(SMALL, tokens) - nats(TINY, tokens)).mean(1)
    assert abs(difference.mean()) > 0.5
    assert other["change"] == pytest.approx(difference.mean(), abs=1e-5)
    assert (other["change_low"], other["change_high"]) == pytest.approx(interval(difference, 5), abs=1e-5)
    assert found["notes"] == []


def test_bundles_with_their_own_held_out_images_change_only_where_these_are_the_same(
    pipeline: Pipeline, images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = pipeline.encode(images)
    bundles = [shutil.copytree(TINY, tmp_path / name) for name in ("first", "same", "other", "fewer", "turned", "none")]
    for bundle, codes, labels in (
        (bundles[0], tokens, LABELS),
        (bundles[1], tokens, LABELS),
        (bundles[2], tokens[::-1], LABELS),
        (bundles[3], tokens[:18], LABELS[:18]),
        (bundles[4], tokens, [(label + 1) % 6 for label in LABELS]),
    ):
        heldout.attach(Bundle.open(bundle), codes, labels)
    found = evaluated(capsys, *bundles, *LIKELIHOOD)
    assert [each["change"] for each in found["likelihoods"]] == [None, 0, None, None, None]
    assert [each["images"] for each in found["likelihoods"]] == [24, 24, 24, 18, 24]
    assert {each["images_from"] for each in found["likelihoods"]} == {"heldout.npz of the bundle"}
    assert found["likelihoods"][2]["nats"] == pytest.approx(nats(TINY, tokens[::-1]).mean(), abs=1e-5)
    missing, incomparable = found["notes"]
    assert missing == f"{bundles[5]} holds no heldout.npz, so its likelihood is not measured; --real names real images."
    assert incomparable.startswith("Likelihoods of other images, or of other codes, say nothing about each other")
    assert found["kept"] == []  # tokens are no pictures
    assert evaluated(capsys, *bundles[:2], *LIKELIHOOD)["notes"] == []


def test_codes_of_another_codebook_are_other_images(pipeline: Pipeline, images: np.ndarray) -> None:
    held = heldout.HeldOut(pipeline.encode(images[:4]), tuple(LABELS[:4]), "here", real=True)
    first = scored(pipeline, "tiny", held, 0)
    more: Scored = replace(first, likelihood=replace(first.likelihood, codes=128))
    assert [each.change for each in beside_the_first([first, more, first], 0)] == [None, None, 0]
    assert beside_the_first([], 0) == []


def test_bundles_of_another_n_and_of_clips_have_the_same_images(
    tiny_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of tokens is another one, so the codes are compared in raster order."""
    one = write_tiny_video(tmp_path / "n1", n=1)
    clips = np.random.default_rng(0).integers(256, size=(6, 5, 16, 16, 3), dtype=np.uint8)
    labels = [0, 1, 2, 0, 1, 2]
    folder = clip_folder(tmp_path / "clips", clips, labels, ["0", "1", "2"])
    found = evaluated(capsys, tiny_video, one, "--real", folder, *LIKELIHOOD)
    each = []
    for bundle in (tiny_video, one):
        with Pipeline.load(bundle, "cpu", threads=1, selftest=False) as loaded:
            tokens = loaded.encode(clips)
            each.append(-loaded.score(tokens, labels).astype(np.float64).mean(1))
            wrong = (loaded.decode(tokens).astype(float) - clips) ** 2
    assert [row["nats"] for row in found["likelihoods"]] == pytest.approx([e.mean() for e in each], abs=1e-5)
    assert found["likelihoods"][1]["change"] == pytest.approx((each[1] - each[0]).mean(), abs=1e-5)
    assert [row["n"] for row in found["likelihoods"]] == [4, 1]
    assert list(found["likelihoods"][1]["phases"]) == ["prefill", "transition", "group"]
    assert found["kept"][1]["psnr"] == pytest.approx(10 * np.log10(255**2 / wrong.mean()))
    assert found["notes"] == []


def test_a_large_model_and_a_small_one_are_measured_on_the_same_images(
    images: np.ndarray, real: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --held-out a large model scores fewer, and then the small one does too."""
    monkeypatch.setattr(options, "WORK", 15 * 61920 * 64)  # SMALL has twice the parameters of TINY
    monkeypatch.setattr(options, "LEAST_IMAGES", 1)
    for order in ((TINY, SMALL), (SMALL, TINY)):
        found = evaluated(capsys, *order, "--real", real, *LIKELIHOOD)
        assert [each["images"] for each in found["likelihoods"]] == [15, 15]
        assert found["likelihoods"][1]["change"] is not None
        assert found["notes"] == []
    assert evaluated(capsys, SMALL, "--real", real, *LIKELIHOOD, "--held-out", "20")["kept"][0]["images"] == 20


def test_a_bundle_without_encoder_scores_tokens_and_no_pictures(
    pipeline: Pipeline, images: np.ndarray, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, codes = without_encoder(tmp_path / "bare"), tmp_path / "codes.npz"
    raster = np.empty((24, 64), np.uint16)
    raster[:, list(pipeline.bundle.order)] = pipeline.encode(images)
    np.savez(codes, codes=raster.reshape(24, 8, 8), labels=np.array(LABELS), class_names=np.array(NAMES))
    found = evaluated(capsys, TINY, bare, "--real", codes, *LIKELIHOOD)
    assert [each["change"] for each in found["likelihoods"]] == [None, 0]
    assert (found["notes"], found["kept"]) == ([], [])
    by_picture = evaluated(capsys, TINY, bare, "--real", real, *LIKELIHOOD)
    assert by_picture["likelihoods"] == [found["likelihoods"][0] | {"images_from": str(real)}]
    assert [each["bundle"] for each in by_picture["kept"]] == [str(TINY)]
    assert by_picture["notes"] == [f"{bare} has no encoder for pictures, so their likelihood is not measured."]


def test_the_tables_say_what_the_numbers_are(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (TINY, SMALL, "--real", real, *LIKELIHOOD)
    first, other = evaluated(capsys, *command)["likelihoods"]
    lines = shown(capsys, *command)
    assert lines[0] == f"{TINY}: likelihood of 24 images"
    at = lines.index("") + 1
    assert lines[at] == (
        f"Likelihood of held-out images ({real}), in nats per token: less is better, guessing has {np.log(64):.3f}."
    )
    head, one, two = (" ".join(line.split()) for line in lines[at + 1 : at + 4])
    assert head == (
        "bundle n calls images nats 95 % prefill sequential transition group from the first 95 % hardest class"
    )
    worst = max(first["classes"], key=first["classes"].get)
    phases = [f"{first['phases'][name]:.3f}" for name in PHASES]
    assert one == (
        f"{TINY} 4 19 24 {first['nats']:.3f} {first['low']:.3f} .. {first['high']:.3f} {' '.join(phases)} "
        f"{worst} {first['classes'][worst]:.3f}"
    )
    assert f" {other['change']:+.3f} {other['change_low']:+.3f} .. {other['change_high']:+.3f} " in two
    kept = [" ".join(line.split()) for line in lines[lines.index("What the tokenizer keeps of the pictures.") :]]
    assert kept[1] == "bundle images PSNR codes used"
    assert kept[2].startswith(f"{TINY} 24 ")
    assert " dB " in kept[2]
    assert kept[2].endswith(" %")
    assert len(kept) == 4  # and no empty line, or notes
    assert shown(capsys, *command, "--quiet") == []


def test_classes_of_one_name_are_told_apart_by_their_index(pipeline: Pipeline) -> None:
    bundle = replace(pipeline.bundle, class_names=["crane", "fox", "crane", "otter", "whale", "frog"])
    assert class_names(bundle) == ["crane (0)", "fox", "crane (2)", "otter", "whale", "frog"]
    assert class_names(replace(bundle, class_names=None)) == ["0", "1", "2", "3", "4", "5"]


def test_the_verb_is_one_of_parvis(capsys: pytest.CaptureFixture[str]) -> None:
    assert parvis(["evaluate", "--help"]) == 0
    assert "usage: parvis evaluate" in capsys.readouterr().out
    with pytest.raises(RequestError, match="no bundle was given"):
        evaluate(Request([]))
