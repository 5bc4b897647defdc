"""Detail of low contrast in the tokenizer's loss and in its report."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from par_model.training.detail import FLOOR, local_mean, low_contrast, similarity


def face(contrast: float) -> torch.Tensor:
    """A flat image [1,3,24,24] with a mouth that is darker by ``contrast``."""
    x = torch.full((1, 3, 24, 24), -0.3)
    x[:, :, 14:16, 8:16] -= contrast
    return x


def test_similarity_is_what_its_formula_says() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 9, 11))
    made = similarity(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])[0, 0].numpy()
    wide_x, wide_y = (np.pad(a, 3, mode="edge") for a in (x, y))
    for i in range(9):
        for j in range(11):
            a, b = (wide[i : i + 7, j : j + 7] for wide in (wide_x, wide_y))
            both = ((a - a.mean()) * (b - b.mean())).mean()
            value = (2 * both + FLOOR) / (a.var() + b.var() + FLOOR)
            assert made[i, j] == pytest.approx(value, abs=1e-6)
    assert float(similarity(face(0.2), face(0.2)).min()) == pytest.approx(1, abs=1e-4)


def test_a_faint_mouth_that_vanishes_costs_nearly_as_much_as_a_strong_one() -> None:
    flat = face(0.0)
    lost = {contrast: float((1 - similarity(face(contrast), flat)).mean()) for contrast in (0.2, 1.0)}
    absolute = {contrast: float((face(contrast) - flat).abs().mean()) for contrast in (0.2, 1.0)}
    assert lost[0.2] > 0.5 * lost[1.0]
    assert absolute[0.2] == pytest.approx(0.2 * absolute[1.0])


def test_detail_that_is_kept() -> None:
    x = face(0.2)

    def kept(y: torch.Tensor) -> float:
        some, of_all = low_contrast(x, y)
        return float(some / of_all)

    assert kept(x) == pytest.approx(1, abs=1e-4)
    assert kept(face(0.0)) == pytest.approx(0, abs=1e-4)
    assert kept(face(0.1)) == pytest.approx(0.5, abs=1e-4)
    assert kept(x + 0.3) == pytest.approx(1, abs=1e-4)  # another brightness is no loss of detail
    assert kept(x.flip(2)) < 0.1  # elsewhere
    assert low_contrast(torch.zeros(1, 3, 9, 9), x[:, :, :9, :9]).tolist() == [0, 0]
    assert local_mean(torch.full((1, 1, 8, 8), 0.5)).allclose(torch.tensor(0.5))
