"""The names of ImageNet's classes: labels by name, index and synset, and names of several classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from par_export import imagenet
from par_model.config import PARConfig, named
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.request import class_index


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Bundle:
    names, synsets = imagenet.classes()
    opened = Bundle.open(tiny)
    model = dict(opened.model) | {"n_classes": 1000}
    return replace(opened, model=model, class_names=tuple(names), class_synsets=tuple(synsets))


def test_the_table_is_whole() -> None:
    names, synsets = imagenet.classes()
    assert len(names) == len(synsets) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)  # ImageNet's order of its classes
    assert (names[0], synsets[0]) == ("tench, Tinca tinca", "n01440764")
    assert names[999].startswith("toilet tissue")


@pytest.mark.parametrize("label", ["otter", "360", 360, "n02444819", " Otter ", "N02444819 ", "+360"])
def test_an_otter_by_any_name(bundle: Bundle, label: int | str) -> None:
    assert class_index(bundle, label) == 360


@pytest.mark.parametrize(
    ("label", "index"),
    [
        ("Carassius auratus", 1),
        ("goldfish, Carassius auratus", 1),
        ("Goldfish,carassius  auratus", 1),
        ("great_white_shark", 2),
        ("man eater", 2),
        ("St. Bernard", 247),
        ("jack o lantern", 607),
        ("JACK-O'-LANTERN", 607),
    ],
)
def test_every_name_of_a_class(bundle: Bundle, label: str, index: int) -> None:
    assert class_index(bundle, label) == index


def test_names_of_several_classes_list_them(bundle: Bundle) -> None:
    with pytest.raises(
        RequestError, match=r"'crane' names classes 134 \(crane, n02012849\) and 517 \(crane, n03126707\)"
    ):
        class_index(bundle, "crane")
    with pytest.raises(
        RequestError, match=r"'panda' names classes 387 \(lesser panda, .*\) and 388 \(giant panda, .*\)"
    ):
        class_index(bundle, "panda")
    with pytest.raises(RequestError, match=r"'maillot' names classes 638 \(maillot\) and 639 \(maillot, tank suit\)"):
        class_index(bundle, "maillot")
    with pytest.raises(
        RequestError, match=r"did you mean cradle, crate, crane, cerastes\?"
    ):  # crane once, though two classes have the name
        class_index(bundle, "crades")
    with pytest.raises(RequestError, match="unknown label 'gold fish'; did you mean goldfish"):
        class_index(bundle, "gold fish")
    with pytest.raises(RequestError, match="unknown label 'n99999999'"):
        class_index(bundle, "n99999999")


@pytest.mark.parametrize("label", ["", " ", "360.0", "²", "1e2", "9" * 5000, "n02444", "-", ","])
def test_labels_that_are_neither_names_nor_numbers(bundle: Bundle, label: str) -> None:
    with pytest.raises(RequestError, match="unknown label"):
        class_index(bundle, label)


@pytest.mark.parametrize("label", ["-1", "1000", 1000, "02444819"])
def test_numbers_out_of_range(bundle: Bundle, label: int | str) -> None:
    with pytest.raises(RequestError, match=r"this model has classes 0\.\.999"):
        class_index(bundle, label)


def test_which_models_get_the_names() -> None:
    assert all(imagenet.fits(named(size)) for size in ("B", "L", "XL", "XXL", "3B"))
    assert not imagenet.fits(named("L", n_classes=101))
    assert not imagenet.fits(PARConfig(dim=64, n_layers=1, n_heads=1, vocab_size=512, grid=(1, 8, 8)))
