"""One PSNR, one softmax, one table of precisions, with the values that their several forerunners disagreed on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from par_runtime.dtypes import BYTES, DTYPE, PRECISIONS, STORAGE, dtype_bytes, least_exact, to_float32
from par_runtime.metrics import finite, log_likelihood, log_softmax, psnr_db


def test_psnr_of_equal_images_is_infinite_and_null_in_json() -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    assert psnr_db(image, image) == math.inf
    assert json.dumps(finite({"psnr_db": psnr_db(image, image)}), allow_nan=False) == '{"psnr_db": null}'


def test_psnr_of_images_that_are_off_by_one_and_by_all() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr_db(black, white) == pytest.approx(0.0)
    assert psnr_db(black, black + 1) == pytest.approx(20 * math.log10(255))
    assert psnr_db(black + 1, black) == psnr_db(black, black + 1)  # no wrap-around of bytes


def test_log_softmax_of_large_and_of_broken_logits() -> None:
    logits = np.array([[1000.0, 1000.0], [0.0, -1000.0]], np.float32)
    np.testing.assert_allclose(log_softmax(logits)[0], [-math.log(2)] * 2)
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1)
    assert np.isnan(log_softmax(np.array([0.0, np.nan], np.float32))).all()
    assert log_likelihood(logits[None], np.array([[1, 0]])).tolist() == [[pytest.approx(-math.log(2)), 0.0]]


def test_finite_reaches_into_lists_and_tuples() -> None:
    assert finite([1, (math.inf, {"a": -math.inf}), math.nan, "nan"]) == [1, [None, {"a": None}], None, "nan"]


def test_precisions_have_one_order_one_dtype_and_one_size() -> None:
    assert PRECISIONS == ("fp32", "fp16", "bf16")
    assert [dtype_bytes(DTYPE[p]) for p in PRECISIONS] == [BYTES[p] for p in PRECISIONS] == [4, 2, 2]
    assert set(STORAGE) == set(DTYPE.values())
    assert least_exact("fp32", "fp32") == "fp32"
    assert least_exact("fp16", "fp32") == "fp16"
    assert least_exact("fp16", "bf16", "fp32") == "bf16"


def test_bfloat16_is_the_upper_half_of_fp32() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.140625], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert (to_float32(bits, "bfloat16") == values).all()
    half = values.astype(np.float16)
    assert (to_float32(half, "float16") == values).all()
    assert to_float32(values, "float32") is values
