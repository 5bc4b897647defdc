"""Files as the published code's savers write them, through the command line: export, greedy tokens, images.

Savers: its DDP trainer (``model``, ``optimizer``, ``steps``, ``args``, maybe ``ema``), its FSDP trainer (a folder with
``consolidated.pth``), DeepSpeed (``module``), and what wrappers and older releases of torch leave in keys and files.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import golden_weights
from par_model.config import PARConfig, VQConfig
from par_model.generation import generate
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.images import png

LABELS = (2, 0)
VQ = VQConfig(codebook_size=96, channels=32, channel_multipliers=(1, 1, 1, 1, 1), res_blocks=1, z_channels=32)


def side_of(n: int) -> int:
    """The smallest grid that has room for two groups of ``n``."""
    return 8 if n == 16 else 4


def config_of(n: int) -> PARConfig:
    """Heads of 100, as the 3B has them."""
    side = side_of(n)
    return PARConfig(dim=200, n_layers=2, n_heads=2, vocab_size=96, n_classes=3, grid=(1, side, side), group_size=n)


@pytest.fixture(scope="module")
def models() -> dict[int, PAR]:
    return {n: golden_weights(PAR(config_of(n))) for n in (1, 4, 16)}


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    model: VQModel = golden_weights(VQModel(VQ))
    return model


def arguments(side: int, **more: Any) -> argparse.Namespace:
    """Arguments as the published trainers' parsers make them, and ``more`` that users add."""
    return argparse.Namespace(
        code_path="/data/codes",
        no_local_save=False,
        gpt_model="GPT-own",
        gpt_ckpt=None,
        gpt_type="c2i",
        vocab_size=96,
        ema=True,
        cls_token_num=1,
        image_size=16 * side,
        downsample_size=16,
        num_classes=3,
        lr=1e-4,
        beta2=0.95,
        global_batch_size=256,
        mixed_precision="bf16",
        distributed=True,
        gpu=0,
        **more,
    )


def leftovers(config: PARConfig) -> dict[str, torch.Tensor]:
    """What old releases of the published code kept in the state dict."""
    heads, size, n = config.n_heads, config.head_dim, config.n_tokens
    out = {"freqs_cis": torch.zeros(n + 1, size // 2, 2)}
    for i in range(config.n_layers):
        out |= {f"layers.{i}.attention.kv_cache.{kind}_cache": torch.zeros(2, heads, n + 8, size) for kind in "kv"}
    return out


def trained(model: PAR) -> dict[str, Any]:
    """The DDP trainer's file after a step: optimizer state with step tensors, ``ema`` of other weights."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.95),
    )
    model(torch.zeros(1, model.config.n_tokens, dtype=torch.int64), torch.tensor([0])).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "steps": np.int64(5),
        "args": arguments(
            model.config.grid[1],
            results_dir=Path("results"),
            layers=[1, None, (2.5, {"deep": {1, 2}})],
            loss=np.float32(0.5),
            kind=np.dtype("float16"),
            ids=np.arange(3),
            dtype=torch.bfloat16,
            device=torch.device("cuda", 0),
            table=collections.defaultdict(list, a=[1]),
            parse=int,
        ),
        "rng": (np.random.RandomState(0).get_state(), torch.get_rng_state()),
        "ema": {key: torch.zeros_like(value) for key, value in model.state_dict().items()},
    }


def renamed(state: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(key): value for key, value in state.items()}


def write(folder: Path, form: str, model: PAR) -> tuple[Path, list[str]]:
    """Write ``model`` in ``form``; returns the file, and the options that its export still needs."""
    file, state = folder / "model.pt", model.state_dict()
    side = model.config.grid[1]
    both = ["--heads", "2", "--grid", str(side)]
    args = arguments(side)
    if form == "trainer":
        torch.save(trained(model), file)
        return file, ["--heads", "2"]  # the grid follows from args
    if form == "trainer, legacy file":
        torch.save(trained(model), file, _use_new_zipfile_serialization=False)
        return file, ["--heads", "2"]
    if form == "bare":
        torch.save(state, file)
        return file, both
    if form == "bare, leftovers":
        torch.save(state | leftovers(model.config), file)
        return file, []  # heads and grid follow from the rotary table
    if form == "module":
        torch.save({"module": state, "optimizer": {}, "ds_config": {"zero": 1}, "ds_version": "0.14"}, file)
        return file, both
    if form == "state_dict":
        torch.save({"state_dict": state, "args": vars(args)}, file)
        return file, ["--heads", "2"]
    if form == "ddp":
        torch.save({"model": renamed(state | leftovers(model.config), lambda key: f"module.{key}")}, file)
        return file, []
    if form == "ddp, compiled":
        torch.save({"model": renamed(state, lambda key: f"module._orig_mod.{key}"), "args": args}, file)
        return file, ["--heads", "2"]
    if form == "fsdp folder":
        wrapped = renamed(
            state, lambda key: f"_fsdp_wrapped_module.{key}".replace("layers.0.", "layers.0._fsdp_wrapped_module.")
        )
        torch.save(wrapped, folder / "consolidated.pth")
        torch.save({"state": {}}, folder / "optimizer.00000-of-00001.pth")
        (folder / "resume_step.txt").write_text("5")
        return folder, both
    if form in ("bf16", "fp16"):
        kind = torch.bfloat16 if form == "bf16" else torch.float16
        torch.save({"model": {key: value.to(kind) for key, value in state.items()}}, file)
        return file, both
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, str(folder / "model.safetensors"))
        return folder / "model.safetensors", both
    assert form == "sharded"
    places = {key: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(places.values()):
        save_file({k: state[k].contiguous() for k, place in places.items() if place == name}, str(folder / name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, both


@pytest.mark.parametrize(
    ("form", "n"),
    [
        *(pytest.param("trainer", n, marks=pytest.mark.slow) for n in (1, 4, 16)),
        ("bare, leftovers", 1),
        *(pytest.param("bare, leftovers", n, marks=pytest.mark.slow) for n in (4, 16)),
        pytest.param("trainer, legacy file", 4, marks=pytest.mark.slow),
        pytest.param("bare", 16, marks=pytest.mark.slow),
        *(pytest.param(form, n, marks=pytest.mark.slow) for form, n in (("module", 4), ("state_dict", 1))),
        pytest.param("ddp", 16, marks=pytest.mark.slow),
        *(pytest.param(form, 4, marks=pytest.mark.slow) for form in ("ddp, compiled", "fsdp folder", "bf16")),
        ("fp16", 16),
        pytest.param("safetensors", 1, marks=pytest.mark.slow),
        ("sharded", 4),
    ],
)
@torch.no_grad()
def test_greedy_tokens_and_images_are_the_oracles(
    tmp_path: Path,
    models: dict[int, PAR],
    tokenizer: VQModel,
    capsys: pytest.CaptureFixture[str],
    form: str,
    n: int,
) -> None:
    model, side = models[n], side_of(n)
    with torch.enable_grad():
        (tmp_path / "model").mkdir()
        file, options = write(tmp_path / "model", form, model)
    torch.save({"model": tokenizer.state_dict(), "args": argparse.Namespace(codebook_size=96)}, tmp_path / "vq.pt")
    bundle, tokens, image = tmp_path / "b", tmp_path / "x.npy", tmp_path / "x.png"
    given = ["--checkpoint", str(file), "--tokenizer", str(tmp_path / "vq.pt"), "--out", str(bundle), "--no-encoder"]
    assert cli.main(["export", *given, *options]) == 0
    output = capsys.readouterr().out
    if "--grid" not in options:
        leftover = form in ("bare, leftovers", "ddp")
        source = f"freqs_cis ({side**2 + 1}, 50, 2)" if leftover else f"args: image_size {16 * side} / 16"
        assert f"grid 1x{side}x{side} (the file's {source})" in output
    if "--heads" not in options:
        assert f"2 heads of 100 (the file's freqs_cis ({side**2 + 1}, 50, 2))" in output
    assert Bundle.open(bundle).calls == n + side**2 // n - 1
    labels = [part for label in LABELS for part in ("--label", str(label))]
    greedy = ["--greedy", "--guidance", "2", "--tokens", str(tokens), "--out", str(image), "--columns", "2", "--quiet"]
    assert cli.main(["generate", str(bundle), *labels, *greedy]) == 0

    oracle = model
    if form in ("bf16", "fp16"):
        kind = torch.bfloat16 if form == "bf16" else torch.float16
        oracle = copy.deepcopy(model).to(kind).float()
    wanted = generate(oracle, LABELS, guidance=2, greedy=True)
    np.testing.assert_array_equal(np.load(tokens), wanted.numpy())
    assert len(np.unique(wanted)) > 3
    order = torch.tensor(Bundle.open(bundle).order)
    raster = torch.empty_like(wanted)
    raster[:, order] = wanted
    pixels = tokenizer.decode(raster.view(-1, side, side))
    pixels = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with Image.open(image) as sheet:
        got = np.asarray(sheet)
    assert got.shape == (16 * side, 32 * side, 3)
    assert np.abs(got.astype(int) - png.sheet(pixels, 2)).max() <= 1
