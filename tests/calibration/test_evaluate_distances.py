"""The numbers of ``parvis evaluate`` about sets of images, on features whose distances can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluating import TINY
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from par_calibration.evaluate import distances as module
from par_calibration.evaluate import images as images_module
from par_calibration.evaluate.distances import Features, distances, drawn_size, share, spread
from par_calibration.evaluate.images import Sets, of_classes
from par_calibration.evaluate.run import check_alike, in_shares
from par_calibration.report import frechet
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.request import Settings

Double = NDArray[np.float64]


def normal(count: int, classes: int = 4, seed: int = 0, width: int = 3) -> Features:
    """Features that differ between classes, which take turns."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return Features(rng.normal(size=(count, width)) + 2 * labels[:, None], labels)


@pytest.mark.parametrize("size", [6, 12, 25, 60])
def test_a_share_has_each_class_in_proportion_and_no_image_twice(size: int) -> None:
    labels = np.repeat([5, 0, 2], [10, 20, 30])[np.random.default_rng(1).permutation(60)]
    for draw in range(50):
        chosen = share(labels, size, np.random.default_rng(draw))
        assert len(set(chosen.tolist())) == len(chosen) == size
        for label, of_class in ((5, 10), (0, 20), (2, 30)):
            exact = size * of_class / 60
            assert np.floor(exact) <= (labels[chosen] == label).sum() <= np.ceil(exact)


def test_every_image_is_drawn_as_often_as_another() -> None:
    labels = np.repeat([0, 1], [7, 14])
    counts = np.zeros(21)
    for draw in range(3000):
        counts[share(labels, 5, np.random.default_rng(draw))] += 1
    rate = 5 / 21
    assert np.abs(counts / 3000 - rate).max() < 4.5 * np.sqrt(rate * (1 - rate) / 3000)


def test_the_distances_of_classes_that_are_points_are_exact() -> None:
    """Every draw and each of its halves has the same features then, up to how a covariance is counted."""
    points = np.random.default_rng(0).normal(size=(4, 3))
    labels = np.arange(64) % 4
    held_out = Features(points[labels], labels)
    moved, stretched = np.array([1.0, -2.0, 0.5]), 3.0

    def width(each: int) -> float:
        return float(np.trace(np.cov(np.repeat(points, each, 0), rowvar=False)))

    # Of the 32 images of a draw 8 are of every class, and 4 of each half.
    wider = (stretched - 1) ** 2 * (2 * width(8) - width(4) + (points.mean(0) ** 2).sum())
    sets = [
        Features(points[labels] + moved, labels),
        Features(stretched * points[labels], labels),
        Features(points[labels], labels),
    ]
    chance, *found = distances(held_out, sets, 0)
    assert chance.mean == pytest.approx(0, abs=1e-6)
    for one, value in zip(found, ((moved**2).sum(), wider, 0), strict=True):
        assert (one.mean, one.margin) == pytest.approx((value, 0), abs=1e-5)


def test_a_distance_is_the_mean_of_those_of_equal_and_disjoint_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is computed again from what was drawn, by scipy's root of a matrix: whole draws, and their halves."""
    held_out, sets = normal(50), [normal(60, seed=1), normal(40, seed=2)]
    drawn: list[tuple[Double, Double]] = []
    real = module.corrected

    def spied(one: Double, other: Double) -> float:
        drawn.append((one, other))
        return real(one, other)

    def frechet_of(one: Double, other: Double) -> float:
        first, second = np.cov(one.T), np.cov(other.T)
        root = np.trace(np.real(sqrtm(first @ second)))
        return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * root)

    monkeypatch.setattr(module, "corrected", spied)
    found = distances(held_out, sets, 3)
    assert len(drawn) == 3 * module.DRAWS
    assert all(one.shape == other.shape == (20, 3) for one, other in drawn)  # half of the smallest set
    rows = [{tuple(row) for row in features.values} for features in (held_out, *sets)]
    every = [pair for each in (held_out, *sets) for pair in zip(each.values, each.labels, strict=True)]
    class_of = {tuple(row): label for row, label in every}
    values = []
    for i, (one, other) in enumerate(drawn):
        mine, others = {tuple(row) for row in one}, {tuple(row) for row in other}
        assert mine <= rows[0]
        assert others <= rows[i % 3]
        assert not mine & others  # also where both sides are held-out images
        assert one is drawn[i - i % 3][0]  # the same for every set
        halves = [(one[::2], other[::2]), (one[1::2], other[1::2])]
        for side in (side for pair in halves for side in pair):
            counts = np.bincount([class_of[tuple(row)] for row in side], minlength=4)
            assert counts.max() - counts.min() <= 2
        values.append(2 * frechet_of(one, other) - np.mean([frechet_of(*pair) for pair in halves]))
    assert len({one.tobytes() for one, _ in drawn}) == module.DRAWS
    for at, row in enumerate(found):
        own = values[at::3]
        assert row.mean == pytest.approx(np.mean(own))
        assert row.margin == pytest.approx(1.96 * np.std(own, ddof=1))
    assert found == distances(held_out, sets, 3)
    assert not set(found) & set(distances(held_out, sets, 4))


@pytest.mark.parametrize(("moved", "wide"), [(0.0, 1.0), (0.0, 0.7), (0.0, 1.2), (0.4, 0.8)])
def test_few_images_add_nothing_to_a_distance_whatever_their_spread(
    monkeypatch: pytest.MonkeyPatch, moved: float, wide: float
) -> None:
    """Of normal features the distance is known: that of the means, and that of the widths, of each feature."""
    monkeypatch.setattr(module, "DRAWS", 20)
    labels = np.arange(120) % 4
    true = 8 * (moved**2 + (wide - 1) ** 2)
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        real, made = (rng.normal(size=(120, 8)) for _ in range(2))
        one = Features(real, labels)
        found.append(distances(one, [Features(wide * made + moved, labels)], seed)[1].mean)
    assert np.mean(found) == pytest.approx(true, abs=3 * np.std(found, ddof=1) / np.sqrt(12) + 0.02)
    assert abs(np.mean(found) - true) < 0.2  # a draw of 60 images alone has 1.2 more, or 0.8 where it is narrow


def test_the_held_out_images_themselves_have_no_distance() -> None:
    held_out = normal(60)
    chance, same, noise = distances(held_out, [held_out, Features(held_out.values * 5, held_out.labels)], 0)
    assert abs(chance.mean) < chance.margin
    assert abs(same.mean) < chance.margin
    assert noise.mean > noise.margin > 0


def test_a_distance_depends_on_no_other_set_of_the_same_size() -> None:
    held_out, one, other = normal(40), normal(32, seed=1), normal(32, seed=2)
    alone = distances(held_out, [one], 0)
    assert distances(held_out, [other, one, one], 0)[2:] == [alone[1]] * 2
    # A smaller set makes all draws smaller, and so less sure.
    fewer = distances(held_out, [one, normal(16, seed=3)], 0)
    assert drawn_size(held_out, [one, other]) == 16
    assert drawn_size(held_out, [one, normal(18)]) == 8  # even: it is halved again
    assert fewer[0].margin > 1.5 * alone[0].margin


def test_the_margin_is_what_other_sets_of_images_differ_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the distance is clear; near 0 the margin may be too wide, and is never too narrow."""
    monkeypatch.setattr(module, "DRAWS", 25)
    for moved, least, most in ((0.5, 0.7, 1.7), (0.0, 1.0, 4.0)):
        found = []
        for seed in range(40):
            one = normal(60, seed=1000 + seed)
            shifted = Features(one.values + moved, one.labels)
            found.append(distances(normal(60, seed=seed), [shifted], seed)[1])
        observed = 1.96 * np.std([each.mean for each in found], ddof=1)
        assert least < np.mean([each.margin for each in found]) / observed < most


def test_spread_is_the_mean_variance_within_a_class() -> None:
    features = np.array([[0.0, 0.0], [2.0, 4.0], [10.0, 0.0], [10.0, 0.0], [99.0, 99.0]])
    # (2 + 8) and 0, with M - 1 in the denominator; the last class has one image, which has no variance.
    assert spread(Features(features, np.array([0, 0, 1, 1, 2]))) == 5
    several = normal(40, classes=4)
    each = [np.trace(np.cov(several.values[i::4], rowvar=False)) for i in range(4)]
    assert spread(several) == pytest.approx(np.mean(each))
    assert spread(Features(features, np.arange(5))) is None


@pytest.mark.parametrize(("count", "expected"), [(80, (67, 13)), (300, (250, 50)), (240, (200, 40)), (12, (10, 2))])
def test_generated_images_have_the_classes_of_the_held_out_ones_in_their_shares(
    count: int, expected: tuple[int, int]
) -> None:
    held_out = np.array([7, 2] * 40 + [7] * 160)  # in turns, as long as there are two
    made = in_shares(held_out, count)
    assert ((made == 7).sum(), (made == 2).sum()) == expected
    assert made[:4].tolist() == [2, 7, 2, 7]
    np.testing.assert_array_equal(in_shares(np.arange(24) % 6, 24), np.arange(24) % 6)


# -- sets of images ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return Bundle.open(TINY)


@pytest.fixture
def by_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of an image are its mean colour and how it differs from left to right."""

    def of(_: object, images: NDArray[np.uint8]) -> Double:
        return np.concatenate([images.mean((1, 2)), images.mean((1, 3))[:, :2]], axis=1)

    monkeypatch.setattr(frechet.Features, "of", of)


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(256, size=(count, 16, 16, 3), dtype=np.uint8)


def test_sets_given_some_at_a_time_are_those_given_at_once(tiny: Bundle, by_mean: None) -> None:
    held, made, labels = pictures(40), pictures(20, 1), np.arange(40) % 6
    found = []
    for parts in ([40], [1, 20, 19]):
        sets = Sets(tiny, 12, 1)
        assert (sets.held_out, sets.fewest, sets.comparison(0)) == (None, None, None)
        cuts = np.cumsum(parts)[:-1]
        sets.hold_out(zip(np.split(held, cuts), np.split(labels, cuts), strict=True), "here")
        assert sets.held_out is not None
        assert sets.held_out.tolist() == labels.tolist()
        sets.add("made", [(made[:5], labels[:5]), (made[5:], labels[5:20])], Settings(guidance=2))
        np.testing.assert_array_equal(sets.rows[0], held[:12])
        np.testing.assert_array_equal(sets.rows[1], made[:12])
        assert sets.fewest == 20
        found.append(sets.comparison(7))
    assert found[0] == found[1]
    assert found[0] is not None
    (one,) = found[0].sets
    features = [Features(frechet.Features.of(None, each), labels[: len(each)]) for each in (held, made)]  # type: ignore[arg-type]
    chance, expected = distances(features[0], [features[1]], 7)
    assert (one.distance, one.margin) == pytest.approx((expected.mean, expected.margin))
    assert (found[0].chance.distance, found[0].chance.margin) == pytest.approx((chance.mean, chance.margin))
    wide, own = spread(features[0]), spread(features[1])
    assert wide is not None
    assert own is not None
    assert one.spread == pytest.approx(own / wide)
    assert (found[0].chance.spread, found[0].chance.images, found[0].chance.settings) == (1, 40, None)
    assert (one.name, one.images, one.settings) == ("made", 20, Settings(guidance=2))
    assert (found[0].compared, found[0].draws, found[0].pixels) == (10, module.DRAWS, "here")
    assert images_module.DRAWS == module.DRAWS


@pytest.mark.parametrize(("held", "made", "enough"), [(16, 16, True), (15, 16, False), (16, 15, False)])
def test_too_few_images_are_not_compared(tiny: Bundle, by_mean: None, held: int, made: int, enough: bool) -> None:
    sets = Sets(tiny, 1, 1)
    sets.hold_out([(pictures(held), np.arange(held) % 6)], "here")
    sets.add("made", [(pictures(made, 1), np.arange(made) % 6)], None)
    assert (sets.comparison(0) is not None) == enough
    with pytest.raises(RequestError, match=r"^none: holds no images of these classes; give others with --label$"):
        sets.add("none", [], None)


def test_images_of_some_classes_are_taken_out_of_parts() -> None:
    images, labels = pictures(9), np.array([0, 1, 2, 0, 0, 0, 2, 1, 1])
    parts = [(images[i : i + 3], labels[i : i + 3]) for i in (0, 3, 6)]
    found = list(of_classes(parts, frozenset([1, 2])))
    assert [each.tolist() for _, each in found] == [[1, 2], [2, 1, 1]]  # a part without any is left out
    np.testing.assert_array_equal(np.concatenate([each for each, _ in found]), images[[1, 2, 6, 7, 8]])
    assert sum(len(each) for each, _ in of_classes(parts, frozenset())) == 9


def test_bundles_of_other_images_are_refused(tiny: Bundle) -> None:
    there = replace(tiny, path=Path("there"))
    clips = Bundle.open(TINY.parents[2] / "models" / "fashion")
    for changed, what in (
        (replace(there, image_size=(16, 24)), r"height and width: \(16, 24\), there \(16, 16\)"),
        (
            replace(there, class_names=["red fox", "arctic fox", "otter", "seal", "whale", "frog"]),
            "class names: others",
        ),
        (replace(there, model=dict(tiny.model) | {"n_classes": 7}), "classes: 7, there 6"),
        (clips, "classes: 10, there 6"),
        (replace(clips, model=tiny.model, class_names=None), f"frames: {clips.frames}, there 1"),
    ):
        with pytest.raises(RequestError, match=rf"of other images than .*tiny \({what}\); give bundles of the same"):
            check_alike(tiny, changed)
    check_alike(tiny, replace(there, image_size=None, class_names=None))  # what ends at tokens has no size
    check_alike(tiny, replace(there, group_size=1, precision="fp32"))


def test_the_encoder_of_features_takes_no_more_threads_than_there_are_cores(tiny: Bundle) -> None:
    """ONNX Runtime would make as many as are asked for, which took minutes and gigabytes."""
    with pytest.warns(UserWarning, match="threads 100000: reduced to"):
        assert Sets(tiny, 1, 100_000).rows == []
