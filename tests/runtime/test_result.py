"""What a result can do: be counted, taken apart, compared, shown and saved."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from par_runtime import Pipeline, RequestError, Result, Settings
from par_runtime.cli import dispatch as cli
from par_runtime.images import png


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return Pipeline.load(tiny, "cpu", threads=1)


@pytest.fixture(scope="module")
def three(pipeline: Pipeline) -> Result:
    return pipeline.generate([0, 4, 2], guidance=[1, 2, 1.5], seed=5)


def test_a_result_is_a_sequence_of_results(pipeline: Pipeline, three: Result) -> None:
    assert len(three) == 3
    assert three.images is not None
    for i, one in enumerate(three):
        assert (one.labels, one.seeds) == ([three.labels[i]], [three.seeds[i]])
        assert one.settings == [three.settings[i]]
        np.testing.assert_array_equal(one.tokens, three.tokens[i : i + 1])
        np.testing.assert_array_equal(one.images, three.images[i : i + 1])
    assert three[-1] == three[2] == pipeline.generate(2, guidance=1.5, seed=7)
    assert three[1:].labels == [4, 2]
    assert len(three[3:]) == 0
    with pytest.raises(IndexError):
        three[3]
    kept = pipeline.generate([0, 4], seed=1, keep=np.ones((2, 8, 8), bool), tokens=three.tokens[:2])
    assert kept[1].kept is not None
    assert kept[1].kept.shape == (1, 64)


def test_equal_results(pipeline: Pipeline, three: Result) -> None:
    again = pipeline.generate([0, 4, 2], guidance=[1, 2, 1.5], seed=5)
    assert again.timings != three.timings
    assert three == again
    other = three.tokens.copy()
    other[1, 7] += 1
    for changed in (
        replace(three, tokens=other),
        replace(three, images=None),
        replace(three, labels=[0, 4, 3]),
        replace(three, settings=[Settings()] * 3),
        replace(three, kept=np.zeros((3, 64), bool)),
        three[:2],
    ):
        assert three != changed
        assert changed == replace(changed)
    assert three != 3
    assert three in [1, three]
    with pytest.raises(TypeError, match="unhashable"):
        hash(three)


def test_its_text_is_short(pipeline: Pipeline, three: Result) -> None:
    assert repr(three) == (
        "Result(3 images, 16x16, bundle 'tiny', labels ['sea otter', 'daisy', 'teapot'], seeds [5, 6, 7])"
    ).replace("['sea otter', 'daisy', 'teapot']", str([pipeline.bundle.class_names[i] for i in (0, 4, 2)]))  # type: ignore[index]
    many = pipeline.generate([0] * 50, seed=1, decode=False)
    assert "50 images, tokens only" in repr(many)
    assert "seeds [1, 2, 3, 4] ...)" in repr(many)
    assert len(repr(many)) < 300


def test_pil_images_and_a_notebook(three: Result) -> None:
    images = three.pil()
    assert [image.mode for image in images] == ["RGB"] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), three.images)
    shown = three._repr_png_()
    assert shown is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), png.sheet(three.images, 2))  # type: ignore[arg-type]
    assert three[:0]._repr_png_() is None


def test_saving(three: Result, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three.save(tmp_path / "new" / "all.png")
    three.save(str(tmp_path / "one.PNG"), indices=1)
    three.save(tmp_path / "two.png", columns=2, indices=[-1, 0])
    assert png.read(tmp_path / "one.PNG")[0].labels == [4]
    recipe, pixels = png.read(tmp_path / "two.png")
    assert (recipe.labels, recipe.seeds) == ([2, 0], [7, 5])
    assert pixels.shape == (16, 32, 3)
    for path in ("new/all.png", "one.PNG", "two.png"):
        assert cli.main(["redo", str(tmp_path / path), "--bundle", str(tiny)]) == 0
        assert "every pixel" in capsys.readouterr().out


def test_the_bytes_of_a_file(three: Result, tmp_path: Path) -> None:
    """For a server: what would be written, without a file."""
    three.save(tmp_path / "a.png", columns=2, indices=[0, 2], scale=3)
    assert three.to_bytes(columns=2, indices=[0, 2], scale=3) == (tmp_path / "a.png").read_bytes()
    assert three[1].to_bytes(".png") == three.to_bytes(indices=1)
    for kind, message in (
        ("png", "kind 'png': expected .png, the ending of a file's name"),
        (7, "kind 7: expected .png"),
        (".gif", "kind '.gif': expected .png"),
        (".a/b.png", "kind '.a/b.png': expected .png"),
    ):
        with pytest.raises(RequestError, match=message):
            three.to_bytes(kind)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="fps 8: these are images, not clips"):
        three.to_bytes(fps=8)


def test_saving_what_or_where_it_cannot_be(three: Result, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "x.jpg", r"x\.jpg: expected a name that ends in \.png"),
        (tmp_path / "x", "expected a name that ends in"),
        (tmp_path, "is a folder; give a file name"),
        ("/dev/null", "expected a name that ends in"),
        (None, "path None: expected the name of a file"),
        (io.BytesIO(), "path <_io.BytesIO"),
        (5, "path 5: expected the name of a file"),
        ("a\0.png", "path 'a.x00.png': expected the name of a file"),
    ):
        with pytest.raises(RequestError, match=message):
            three.save(path)  # type: ignore[arg-type]
    for indices in (3, -4, [0, 9], [], ["a"], "01", 1.5, [[0]]):
        with pytest.raises(
            RequestError, match=r"^indices .*: expected one or more whole numbers, each of the 3 images"
        ):
            three.save(tmp_path / "x.png", indices=indices)  # type: ignore[arg-type]
    for columns in (0, -1, 1.5, "2", True, 10**6):
        with pytest.raises(RequestError, match="columns"):
            three.save(tmp_path / "x.png", columns=columns)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_integers_of_numpy_are_integers_here_too(three: Result, tmp_path: Path, kind: type[np.integer]) -> None:
    three.save(tmp_path / "int.png", columns=2, indices=1, scale=16)
    three.save(tmp_path / "numpy.png", columns=kind(2), indices=kind(1), scale=kind(16), pasted=np.False_)
    assert (tmp_path / "numpy.png").read_bytes() == (tmp_path / "int.png").read_bytes()
    three.save(tmp_path / "numpy.png", columns=kind(2), indices=np.array(1, kind), scale=np.array(16, kind))
    assert (tmp_path / "numpy.png").read_bytes() == (tmp_path / "int.png").read_bytes()
    three.save(tmp_path / "int.png", indices=[2, 0])
    three.save(tmp_path / "numpy.png", indices=np.array([2, 0], kind))
    assert (tmp_path / "numpy.png").read_bytes() == (tmp_path / "int.png").read_bytes()


def test_bad_arguments_of_save(three: Result, tmp_path: Path) -> None:
    second = np.timedelta64(1, "s")
    for bad in (None, "2", 1.0, True, 0, -1, second, np.array([1, 2]), np.float32):
        if bad is not None:
            with pytest.raises(RequestError, match=r"^columns .*: expected a whole number, 1 or more$"):
                three.save(tmp_path / "a.png", columns=bad)
        with pytest.raises(RequestError, match=r"^scale .*: expected a whole number from 1 to 64$"):
            three.save(tmp_path / "a.png", scale=bad)
    for bad in (True, [True], 1.0, [1.0], {1}, {1: 1}, "1", b"1", second, [second], 3, [0, 3], [], np.float32):
        with pytest.raises(RequestError, match=r"^indices .*: expected "):
            three.save(tmp_path / "a.png", indices=bad)
    with pytest.raises(RequestError, match=r"^indices: more than 1048576 values"):
        three.save(tmp_path / "a.png", indices=itertools.repeat(0))
    for bad in (None, "no", 2, np.array([1, 2])):
        with pytest.raises(RequestError, match=r"^pasted .*: expected True or False$"):
            three.save(tmp_path / "a.png", pasted=bad)
    with pytest.raises(RequestError, match=r"^'\\n\\x1b\[2J': expected a name that ends in \.png"):
        three.save("\n\x1b[2J")
    with pytest.raises(RequestError, match=r"^this result holds no images"):
        three[3:].save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_images_says_how_to_get_them(pipeline: Pipeline, tmp_path: Path) -> None:
    tokens_only = pipeline.generate(0, seed=1, decode=False)
    for work in (tokens_only.pil, lambda: tokens_only.save(tmp_path / "x.png")):
        with pytest.raises(RequestError, match=r"these are tokens only \(decode=False\); pipeline.decode"):
            work()
    assert tokens_only._repr_png_() is None


def test_equal_recipes(three: Result, tmp_path: Path) -> None:
    three.save(tmp_path / "a.png")
    three.save(tmp_path / "b.png", columns=3)
    a, b = (png.read(tmp_path / name)[0] for name in ("a.png", "b.png"))
    assert a == png.read(tmp_path / "a.png")[0]
    assert a != b
    assert a != 5


def test_settings_with_arrays_can_be_compared() -> None:
    """Python's own equality of a dataclass raises for arrays of more than one number."""
    several = np.array([1.0, 2.0])
    assert Settings(guidance=several) == Settings(guidance=several.copy())  # type: ignore[arg-type]
    assert Settings(guidance=several) != Settings()  # type: ignore[arg-type]
    assert len({Settings(), Settings(), Settings(top_k=5)}) == 2
    assert Settings() != "Settings()"


def bad_images(images: NDArray[np.uint8]) -> dict[str, object]:
    """What may stand where images should: values that a cast would make black, or wrap, and other shapes."""
    return {
        "0..1": images / 255,
        "float32": images.astype(np.float32) * 1.2,
        "whole": images.astype(np.int64),
        "bool": images > 100,
        "list": images.tolist(),
        "object": images.astype(object),
        "half": images[:, ::2, ::2],
        "planes": images.transpose(0, 3, 1, 2),
        "grey": images[..., 0],
        "alpha": np.concatenate([images, images[..., :1]], 3),
        "one": images[0],
    }


def test_images_that_are_none_of_the_bundle_are_not_saved(three: Result, tmp_path: Path) -> None:
    assert three.images is not None
    for name, bad in bad_images(three.images).items():
        wrong = replace(three, images=bad)  # type: ignore[arg-type]
        for use in (lambda w=wrong: w.save(tmp_path / "a.png"), wrong.to_bytes, wrong.pil, wrong._repr_png_):
            with pytest.raises(RequestError, match=r"^images have shape .*; expected uint8 \[B,16,16,3\]") as caught:
                use()
            cast = "np.rint(x).clip(0, 255).astype(np.uint8)" in str(caught.value)
            assert cast == (np.asarray(bad).dtype != np.uint8), name
    with pytest.raises(RequestError, match=r"^2 images for 3 labels; give one of each"):
        replace(three, images=three.images[:2]).save(tmp_path / "a.png")
    for same in (np.asfortranarray(three.images), three.images[:, ::-1].copy()[:, ::-1]):
        assert replace(three, images=same).to_bytes() == three.to_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": np.zeros((3, 64))}, "tokens have shape .* and type float64; expected integers"),
        ({"tokens": np.full((3, 64), -1)}, "tokens lie in -1..-1"),
        ({"tokens": np.full((3, 64), 99999)}, "tokens lie in 99999..99999"),
        ({"tokens": np.zeros((2, 64), int)}, "2 tokens for 3 labels"),
        ({"tokens": np.zeros((3, 63), int)}, r"tokens have shape \(3, 63\); expected \[B,64\]"),
        ({"tokens": None}, "tokens have shape"),
        ({"labels": [0]}, "3 images for 1 labels"),
        ({"labels": [99, 2, 3]}, "label 99: this model has classes"),
        ({"labels": None}, "label None: expected a class index or name"),
        ({"seeds": [-1, 2, 3]}, "seed -1: expected a whole number"),
        ({"seeds": [1.0, 2, 3]}, "seed 1.0: expected a whole number"),
        ({"seeds": [1]}, "1 seeds for 3 images"),
        ({"seeds": None}, "seeds None: expected a list of one per image"),
        ({"settings": None}, "settings None: expected a list of one per image"),
        ({"settings": [None] * 3}, "settings .*: expected a Settings, or a list"),
        ({"settings": [Settings(guidance=float("nan"))] * 3}, "guidance nan: expected"),
        ({"settings": [Settings()]}, "1 settings for 3 images"),
        ({"kept": np.zeros((3, 64))}, r"kept has shape \(3, 64\) and type float64; expected bool \[3,64\]"),
        ({"kept": np.zeros((1, 64), bool)}, r"kept has shape \(1, 64\)"),
        ({"made_on": "a CPU"}, "made_on 'a CPU': expected what generate"),
    ],
)
def test_a_result_with_a_wrong_field_is_not_saved(
    three: Result, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    wrong = replace(three, **fields)
    for use in (lambda: wrong.save(tmp_path / "a.png"), wrong.to_bytes):
        with pytest.raises(RequestError, match=f"^{message}"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_fields_of_numpy_are_saved_as_numbers(three: Result, pipeline: Pipeline) -> None:
    numpys = replace(
        three,
        labels=np.array(three.labels),  # type: ignore[arg-type]
        seeds=[np.uint64(seed) for seed in three.seeds],  # type: ignore[misc]
        settings=[
            replace(each, guidance=np.float64(each.guidance), top_k=np.int64(each.top_k), greedy=np.False_)
            for each in three.settings
        ],
        tokens=three.tokens.tolist(),
        kept=np.ones((3, 64), bool).tolist(),
    )
    assert numpys.to_bytes(indices=[2, 0]) == replace(three, kept=np.ones((3, 64), bool)).to_bytes(indices=[2, 0])
    names = [pipeline.bundle.class_names[i] for i in three.labels]  # type: ignore[index]
    assert replace(three, labels=names).to_bytes() == three.to_bytes()  # type: ignore[arg-type]


def test_a_sheet_casts_nothing() -> None:
    with pytest.raises(TypeError, match="Cannot cast"):
        png.sheet(np.full((1, 2, 2, 3), 0.5), 1)  # type: ignore[arg-type]
