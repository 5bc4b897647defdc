"""Rows of the gate's batches: guided and unguided images in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import golden_config
from par_export.gate.runner import GuidedRows, run_step


def test_rows_of_guided_and_unguided_images() -> None:
    batch = GuidedRows(np.array([1.0, 2.0, 0.5, 3.0], np.float32))
    assert batch.of_row.tolist() == [0, 1, 2, 3, 1, 3]
    assert batch.uncond_row.tolist() == [0, 4, 2, 5]
    assert batch.labels(np.array([7, 8, 9, 6]), 10).tolist() == [7, 8, 9, 6, 10, 10]
    logits = np.random.default_rng(0).standard_normal((6, 3, 5)).astype(np.float32)
    guided = batch.guided(logits)
    assert guided.shape == (4, 3, 5)
    assert (guided[[0, 2]] == logits[[0, 2]]).all()  # not guided: their own row, for every scale up to 1
    for image, without, scale in ((1, 4, 2.0), (3, 5, 3.0)):
        wanted = logits[without] + scale * (logits[image] - logits[without])
        np.testing.assert_allclose(guided[image], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", [[1.0, 1.0], [2.0, 2.0]])
def test_rows_of_images_with_one_guidance(guidance: list[float]) -> None:
    batch = GuidedRows(np.array(guidance, np.float32))
    some = [2, 3] if guidance[0] > 1 else []
    assert batch.of_row.tolist() == [0, 1, *([0, 1] if some else [])]
    assert batch.uncond_row.tolist() == (some or [0, 1])
    logits = np.ones((len(batch.of_row), 2, 3), np.float32)
    assert (batch.guided(logits) == logits[:2]).all()


def test_an_image_does_not_depend_on_its_batch(golden: dict[str, dict[str, Any]], bundles: dict[str, Path]) -> None:
    """One image is fed random tokens, the others are greedy, guided or not: each is as if it were generated alone."""
    config = golden_config(golden["par_n4_grid8"])
    labels, guidance = np.array([3, 1, 4, 1]), np.array([1.0, 2.0, 1.0, 1.5], np.float32)
    teacher = np.full((4, config.n_tokens), -1)
    teacher[0] = np.random.default_rng(1).integers(0, config.vocab_size, config.n_tokens)
    tokens, logits = run_step(bundles["fp32"], config, labels, guidance, teacher)
    assert (tokens[0] == teacher[0]).all()
    for b in range(4):
        one, own = run_step(bundles["fp32"], config, labels[b : b + 1], guidance[b : b + 1], teacher[b : b + 1])
        assert (one[0] == tokens[b]).all()
        assert np.abs(own[0] - logits[b]).max() < 1e-4 * np.abs(own).max()
