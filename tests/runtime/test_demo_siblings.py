"""The two bundles of the demo that ship: n = 4 and 16, one tokenizer, one set of held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from par_runtime import Pipeline, cli

MODELS = Path(__file__).parents[2] / "models"
BUNDLES = {4: MODELS / "demo", 16: MODELS / "demo-n16"}
EACH = 2  #: held-out images of each class that are scored


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
    assert {n: pipeline.bundle.calls for n, pipeline in demos.items()} == {4: 67, 16: 31}
    assert {pipeline.bundle.group_size for pipeline in demos.values()} == {4, 16}
    four, other = demos[4].bundle, demos[16].bundle
    assert other.name == "demo-n16"
    assert (other.class_names, other.defaults) == (four.class_names, four.defaults)
    assert other.calibration is not None
    assert {key: size for key, size in other.model.items() if key != "parameters"} == {
        key: size for key, size in four.model.items() if key != "parameters"
    }


def test_their_tokenizers_are_one(demos: dict[int, Pipeline]) -> None:
    images = {n: unordered(pipeline) for n, pipeline in demos.items()}
    assert images[4] == images[16]
    assert len(images[4]) == 240
    tokens = demos[4].encode(demos[4].generate("micah", seed=1).images)
    codes = demos[4].grid_tokens(tokens).reshape(1, -1)
    four = demos[4].decode(tokens)
    np.testing.assert_array_equal(demos[16].decode(codes[:, list(demos[16].bundle.order)]), four)
    a, b = (demos[n].grid_tokens(demos[n].encode(four)) for n in (4, 16))
    np.testing.assert_array_equal(a, b)


def test_more_tokens_in_one_call_know_less_of_each_other(demos: dict[int, Pipeline]) -> None:
    """The fewer calls, the more nats per token of real images."""
    nats = {}
    for n, pipeline in demos.items():
        tokens, labels = held_out(pipeline)
        chosen = slice(0, EACH * pipeline.bundle.n_classes)
        nats[n] = -float(pipeline.score(tokens[chosen], labels[chosen].tolist()).mean())
    assert 1 < nats[4] < nats[16] < 2


def test_a_sibling_does_what_the_demo_does(
    demos: dict[int, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generate, make again, and edit on the command line; the part that is kept stays."""
    bundle, first, second = str(BUNDLES[16]), str(tmp_path / "first.png"), str(tmp_path / "second.png")
    assert cli.main(["generate", bundle, "--label", "micah", "dylan", "--seed", "1", "--out", first, "--quiet"]) == 0
    assert cli.main(["redo", first, "--bundle", bundle, "--quiet"]) == 0
    assert cli.main(["edit", first, "--bundle", bundle, "--which", "0", "--keep", "left", "--out", second]) == 0
    assert capsys.readouterr().err.count("error") == 0
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    made = demos[16].generate("micah", seed=1)
    again = demos[16].generate("micah", seed=9, keep=mask, tokens=made.tokens[0])
    a, b = (demos[16].grid_tokens(one.tokens)[0] for one in (made, again))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (a[:, 8:] != b[:, 8:]).any()
