"""The three bundles of the demo that ship: n = 1, 4 and 16, one tokenizer, one set of held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from par_runtime import Pipeline, cli
from par_runtime.images import png

MODELS = Path(__file__).parents[2] / "models"
BUNDLES = {1: MODELS / "demo-n1", 4: MODELS / "demo", 16: MODELS / "demo-n16"}


@pytest.fixture(scope="module")
def demos() -> Iterator[dict[int, Pipeline]]:
    """A pipeline of each bundle, by n."""
    pipelines = {n: Pipeline.load(path) for n, path in BUNDLES.items()}
    yield pipelines
    for pipeline in pipelines.values():
        pipeline.close()


def held_out(pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    with np.load(pipeline.bundle.path / "heldout.npz") as stored:
        return stored["tokens"].astype(np.int64), stored["labels"].astype(np.int64)


def unordered(pipeline: Pipeline) -> list[tuple[int, bytes]]:
    """Class and codes in raster order of each held-out image; their order in the file means nothing."""
    tokens, labels = held_out(pipeline)
    return sorted((int(label), row.tobytes()) for label, row in zip(labels, pipeline.grid_tokens(tokens), strict=True))


def test_they_differ_in_n_alone(demos: dict[int, Pipeline]) -> None:
    assert {n: pipeline.bundle.calls for n, pipeline in demos.items()} == {1: 256, 4: 67, 16: 31}
    assert {n: pipeline.bundle.quantised for n, pipeline in demos.items()} == {1: "int4", 4: None, 16: "int8"}
    four = demos[4].bundle
    for n in (1, 16):
        other = demos[n].bundle
        assert (other.name, other.group_size) == (f"demo-n{n}", n)
        assert (other.class_names, other.defaults) == (four.class_names, four.defaults)
        assert {key: size for key, size in other.model.items() if key != "parameters"} == {
            key: size for key, size in four.model.items() if key != "parameters"
        }


def test_they_have_less_than_40_megabytes_together(demos: dict[int, Pipeline]) -> None:
    files = [entry for pipeline in demos.values() for entry in pipeline.bundle.files.values()]
    manifests = [(path / "manifest.json").stat().st_size for path in BUNDLES.values()]
    assert sum(int(entry["bytes"]) for entry in files) + sum(manifests) < 40e6


def test_their_tokenizers_are_one(demos: dict[int, Pipeline]) -> None:
    images = {n: unordered(pipeline) for n, pipeline in demos.items()}
    assert images[1] == images[4] == images[16]
    assert len(images[4]) == 240
    tokens = demos[4].encode(demos[4].generate("micah", seed=1).images)
    codes = demos[4].grid_tokens(tokens).reshape(1, -1)
    four = demos[4].decode(tokens)
    for n in (1, 16):
        np.testing.assert_array_equal(demos[n].decode(codes[:, list(demos[n].bundle.order)]), four)
    a, b = (demos[n].grid_tokens(demos[n].encode(four)) for n in (4, 16))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        (1, {1: 1.072, 4: 1.162, 16: 1.217}),
        pytest.param(20, {1: 1.114, 4: 1.167, 16: 1.215}, marks=pytest.mark.slow),  # those of models/README.md
    ],
)
def test_how_likely_real_images_are(each: int, expected: dict[int, float], demos: dict[int, Pipeline]) -> None:
    """Nats per token of the held-out images, the first ``each`` of a class."""
    nats = {}
    for n, pipeline in demos.items():
        tokens, labels = held_out(pipeline)
        chosen = slice(0, each * pipeline.bundle.n_classes)
        nats[n] = -float(pipeline.score(tokens[chosen], labels[chosen].tolist()).mean())
    assert nats == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_a_sibling_does_what_the_demo_does(
    n: int, demos: dict[int, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generate, make again, and edit on the command line; the part that is kept stays."""
    bundle, first, second = str(BUNDLES[n]), str(tmp_path / "first.png"), str(tmp_path / "second.png")
    assert cli.main(["generate", bundle, "--label", "micah", "--seed", "1", "--out", first, "--quiet"]) == 0
    assert cli.main(["redo", first, "--bundle", bundle, "--quiet"]) == 0
    assert cli.main(["edit", first, "--bundle", bundle, "--keep", "left", "--out", second]) == 0
    assert capsys.readouterr().err.count("error") == 0
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    made = demos[n].generate("micah", seed=1)
    again = demos[n].generate("micah", seed=9, keep=mask, tokens=made.tokens[0])
    a, b = (demos[n].grid_tokens(one.tokens)[0] for one in (made, again))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (a[:, 8:] != b[:, 8:]).any()


def test_the_one_without_an_encoder_says_so(
    demos: dict[int, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its place went into the 40 MB; pictures are encoded by the others."""
    assert {n: "encoder" in pipeline.bundle.graphs for n, pipeline in demos.items()} == {1: False, 4: True, 16: True}
    picture = tmp_path / "photo.png"
    demos[4].generate("micah", seed=1).save(picture)
    arguments = ["reconstruct", str(picture), "--bundle", str(BUNDLES[1]), "--out", str(tmp_path / "out.png")]
    assert cli.main(arguments) == 2
    assert "encoder" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    for n, title, said in (
        (1, "demo-n1  (int4 and fp16, hash ", "encoder   none: edits what it made itself; pictures of others"),
        (4, "demo  (fp16, hash ", "encoder   yes\n"),
    ):
        assert cli.main(["inspect", str(BUNDLES[n])]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(title)
        assert said in printed


def test_one_edits_what_another_made_and_knows_its_class_by_name(
    demos: dict[int, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, out = tmp_path / "sheet.png", tmp_path / "out.png"
    demos[16].generate(["micah", "dylan"], seed=1).save(sheet)
    arguments = ["edit", str(sheet), "--bundle", str(BUNDLES[4]), "--which", "1", "--keep", "left", "--out", str(out)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "sheet.png was made by bundle 'demo-n16'; encoding its pixels" in said.err
    recipe, _ = png.read(out)
    assert [demos[4].bundle.class_names[label] for label in recipe.labels] == ["dylan"]
    renamed = replace(demos[4].bundle, class_names=tuple("abcdefghijkl"))
    assert recipe.class_of(0, renamed) == recipe.labels[0]  # of its own bundle names do not count
    of_sheet, _ = png.read(sheet)
    assert [of_sheet.class_of(i, demos[4].bundle) for i in (0, 1)] == of_sheet.labels
    assert of_sheet.class_of(0, renamed) is None
    assert of_sheet.class_of(0, replace(renamed, class_names=("micah",) * 12)) is None  # which of them?
    assert of_sheet.class_of(0, replace(renamed, class_names=None)) is None
