"""The model and its generation against numbers of the published implementation (tests/golden)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import GOLDEN, golden_config, golden_weights, recipe
from par_model.config import VQConfig, named
from par_model.generation import generate
from par_model.transformer import PAR
from par_model.vq import VQModel

NAMES = ["par_n4_grid8", "ar_n1_grid8"]


@pytest.mark.parametrize("name", NAMES)
def test_teacher_forced_logits(golden: dict[str, dict[str, Any]], name: str) -> None:
    g = golden[name]
    model = golden_weights(PAR(golden_config(g)))
    with torch.no_grad():
        logits = model(torch.from_numpy(g["teacher_tokens"]).long(), torch.from_numpy(g["labels"]).long())
    assert logits.dtype == torch.float32
    assert np.abs(logits.numpy() - g["teacher_logits"]).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_identical(golden: dict[str, dict[str, Any]], name: str) -> None:
    g = golden[name]
    model = golden_weights(PAR(golden_config(g)))
    tokens = generate(model, g["labels"].tolist(), guidance=g["spec"]["cfg"], greedy=True)
    assert (tokens.numpy() == g["greedy_tokens"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_exactly_the_published_keys(golden: dict[str, dict[str, Any]], name: str) -> None:
    model = PAR(golden_config(golden[name]))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == golden[name]["keys"]


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("B", 110_890_752), ("L", 342_914_048), ("XL", 774_703_360), ("XXL", 1_410_977_280), ("3B", 3_096_668_800)],
)
def test_named_sizes_have_the_published_parameters(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = PAR(named(size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vq16_has_the_published_keys_and_parameters() -> None:
    with torch.device("meta"):
        model = VQModel(VQConfig())
    assert len(model.state_dict()) == 344
    assert sum(p.numel() for p in model.parameters()) == 71_883_403
    assert sum(p.numel() for p in model.decoder.parameters()) == 42_449_795
    assert model.state_dict()["quantize.codebook_used"].shape == (65536,)


@pytest.fixture(scope="module")
def vq16() -> VQModel:
    model: VQModel = golden_weights(VQModel(VQConfig()))
    return model


@pytest.mark.slow
@torch.no_grad()
def test_vq16_decodes_as_the_reference(vq16: VQModel) -> None:
    with np.load(GOLDEN / "vq16_grid24.npz") as g:
        ids = torch.from_numpy(g["tokens"][:1]).long().view(1, 24, 24)
        image = vq16.decode(ids)[0].numpy()
        stride = 384 // g["image_strided"].shape[-1]
        assert np.abs(image[:, ::stride, ::stride] - g["image_strided"][0]).max() < 1e-3
        assert image.mean((1, 2)) == pytest.approx(g["image_mean"][0], abs=1e-3)
        assert image.std((1, 2)) == pytest.approx(g["image_std"][0], abs=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_vq16_encodes_as_the_reference(vq16: VQModel) -> None:
    y, x = np.mgrid[0:384, 0:384].astype(np.float32) / 384
    image = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y - 2 * x), np.sin(20 * x * y)])
    ids = vq16.encode(torch.from_numpy(image[None])).numpy().reshape(-1)
    with np.load(GOLDEN / "vq16_grid24.npz") as g:
        assert (ids == g["encoded"]).sum() >= 570


def test_bad_images_and_ids_are_refused() -> None:
    model = VQModel(VQConfig(codebook_size=16, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32))
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match=r"ids 0\.\.15"):
        model.decode(torch.full((1, 2, 2), 16))
    with pytest.raises(ValueError, match=r"expected \[B,h,w\]"):
        model.decode(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="not a multiple of norm_groups=32"):
        VQConfig(channels=48)


def test_recipe_weights_depend_on_key_and_shape_only() -> None:
    assert (recipe.weight("output.weight", (4, 3)) == recipe.weight("output.weight", (4, 3))).all()
