"""``models/recipe/from_bundle.py``: a bundle becomes checkpoints, and an export of these stores the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe_scripts import full_disk, scripts

from conftest import golden_weights
from par_export.bundle import ExportRequest, export
from par_export.errors import ExportError
from par_export.weights import WeightsWriter, write_tokenizer_weights, write_weights
from par_model.checkpoint import open_checkpoint, par_config, vq_config
from par_model.config import PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime.bundle import Bundle, seal
from par_runtime.cli import dispatch as cli
from par_runtime.dtypes import DTYPE

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """``from_bundle.py``."""
    with scripts("from_bundle") as (module,):
        yield module


def written(folder: Path, precision: str, encoder: bool) -> tuple[np.ndarray, WeightsWriter]:
    """The weights file that an export of the restored checkpoints in ``folder`` writes."""
    model, tokenizer = open_checkpoint(folder / "model.pt"), open_checkpoint(folder / "tokenizer.pt")
    vq_config(tokenizer)  # every key is there
    weights = WeightsWriter(folder / "weights.data")
    write_weights(weights, par_config(model), model, DTYPE[precision])
    write_tokenizer_weights(weights, tokenizer, DTYPE[precision], encoder)
    weights.close()
    return np.fromfile(folder / "weights.data", np.uint8), weights


def test_an_export_of_the_restored_checkpoints_writes_the_same_file(
    tiny: Path, tmp_path: Path, script: ModuleType
) -> None:
    assert script.main([str(tiny), "--out", str(tmp_path)]) == 0
    got, weights = written(tmp_path, "fp16", encoder=True)
    wanted = np.fromfile(tiny / "weights.data", np.uint8)
    assert got.size == wanted.size
    for name in ("cos", "sin"):  # computed, not stored: another machine may round them differently
        at = weights.entries[name]
        here = slice(at.offset, at.offset + at.length)
        np.testing.assert_allclose(got[here].view(np.float32), wanted[here].view(np.float32), atol=1e-6)
        got[here] = wanted[here] = 0
    np.testing.assert_array_equal(got, wanted)
    model = open_checkpoint(tmp_path / "model.pt")
    assert model.class_names == list(Bundle.open(tiny).class_names or ())
    assert model.config["kind"] == "par"
    assert open_checkpoint(tmp_path / "tokenizer.pt").config["norm_groups"] == 4


def test_padded_heads_an_ablation_and_a_missing_encoder(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Head size 12 is stored as 16; the order is found in the manifest; a missing encoder is reported."""
    config = PARConfig(
        dim=24, n_layers=1, n_heads=2, vocab_size=16, n_classes=3, grid=(1, 4, 4), order="raster",
        sequential_initial=False,
    )  # fmt: skip
    vq = VQConfig(
        codebook_size=16,
        codebook_dim=4,
        channels=8,
        channel_multipliers=(1,),
        res_blocks=1,
        z_channels=8,
        norm_groups=4,
    )
    model, tokenizer = golden_weights(PAR(config)), golden_weights(VQModel(vq))
    torch.save({"model": model.state_dict(), "config": asdict(config)}, tmp_path / "model.pt")
    torch.save({"model": tokenizer.state_dict(), "config": asdict(vq)}, tmp_path / "vq.pt")
    request = ExportRequest(tmp_path / "model.pt", tmp_path / "vq.pt", tmp_path / "bundle", "bf16", encoder=False)
    bundle = export(request, say=lambda _: None)
    assert script.main([str(bundle), "--out", str(tmp_path / "back")]) == 0
    assert "holds no encoder; that of tokenizer.pt is random" in capsys.readouterr().out
    got, _ = written(tmp_path / "back", "bf16", encoder=False)
    np.testing.assert_array_equal(got, np.fromfile(bundle / "weights.data", np.uint8))
    back = open_checkpoint(tmp_path / "back" / "model.pt")
    assert par_config(back) == config
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.tensor(key), tensor.bfloat16().float()), key


def test_a_bundle_that_is_exported_again_keeps_what_it_says(
    tiny: Path, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling settings, class names, name and tokens, by the command that the script prints."""
    changed = tmp_path / "tiny"  # the bundle with settings that are all unlike those of an export
    shutil.copytree(tiny, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    settings = {"guidance": 2.5, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "guidance_interval": 5}
    (changed / "manifest.json").write_text(json.dumps(seal(manifest | {"defaults": settings, "name": "tiny again"})))
    assert script.main([str(changed), "--out", str(tmp_path / "back")]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("a bundle of the same images: parvis export ")
    command = said.removeprefix("a bundle of the same images: parvis ").split()
    assert cli.main([*command[:-1], str(tmp_path / "one")]) == 0
    line = "guidance 2.5, temperature 0.9, top_k 40, top_p 0.95, guidance_interval 5, name 'tiny again': of the bundle"
    assert line in capsys.readouterr().out
    old, new = (json.loads((folder / "manifest.json").read_text()) for folder in (changed, tmp_path / "one"))
    for entry in ("defaults", "name", "class_names", "precision", "selftest", "model", "tokenizer", "order", "phases"):
        assert new[entry] == old[entry], entry
    given = ["--guidance", "1", "--guidance-interval", "-1", "--name", "other"]  # options win
    assert cli.main([*command[:-1], str(tmp_path / "two"), *given]) == 0
    other = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert (other["name"], other["defaults"]) == (
        "other",
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "guidance": 1},
    )


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"guidance": "4"}, "c.pt: default 'guidance' is a str; expected a number"),
        ({"top_p": 2.0}, "c.pt: default top_p 2.0; expected 0 to 1"),
        ({"top_k": True}, "c.pt: default 'top_k' is a bool"),
        ({"speed": 1}, "c.pt: default 'speed'; expected one of guidance,"),
        ({5: 1}, "c.pt: default '5'; expected one of guidance,"),
        ({"top_k": 10**300}, "c.pt: default top_k an integer of about 301 digits; expected 0 or more"),
        ({"guidance_interval": 10**300}, "c.pt: default guidance_interval an integer of about 301 digits"),
        ({"guidance": float("nan")}, "c.pt: default guidance nan; expected 0 or more"),
    ],
)
def test_settings_in_a_file_are_checked(tmp_path: Path, defaults: dict[Any, Any], message: str) -> None:
    config = PARConfig(dim=16, n_layers=1, n_heads=2, vocab_size=16, n_classes=3, grid=(1, 4, 4))
    content = {"model": PAR(config).state_dict(), "config": asdict(config), "bundle": {"defaults": defaults}}
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ExportError, match=re.escape(message)):
        export(ExportRequest(tmp_path / "c.pt", None, tmp_path / "b"), say=lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [4, 8])
def test_a_rounded_codebook_rounds_to_itself_again(script: ModuleType, dtype: torch.dtype, dim: int) -> None:
    codes = F.normalize(torch.randn((4096, dim), generator=torch.Generator().manual_seed(dim)), dim=-1)
    codes[0], codes[1] = 0.0, 0.0
    codes[0, 0], codes[1, 1] = 1.0, -1.0
    stored = codes.to(dtype)
    assert (
        F.normalize(stored.float(), dim=-1).to(dtype) != stored
    ).any()  # a codebook that is rounded once more changes
    unrounded = script.before_rounding(stored)
    assert torch.equal(F.normalize(unrounded, dim=-1).to(dtype), stored)
    assert (unrounded - codes).abs().max() < 2 * torch.finfo(dtype).eps


def test_a_codebook_of_fp32_moves_by_a_last_bit_at_most(script: ModuleType) -> None:
    stored = F.normalize(torch.randn((4096, 8), generator=torch.Generator().manual_seed(0)), dim=-1)
    assert (F.normalize(script.before_rounding(stored), dim=-1) - stored).abs().max() <= torch.finfo(torch.float32).eps


def test_a_folder_without_a_bundle_is_one_line(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(tmp_path), "--out", str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("from_bundle.py: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_read_back_is_one_line_and_writes_nothing(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a\nfile"
    file.touch()

    def refused(text: str, bundle: Path, out: Path) -> None:
        assert script.main([str(bundle), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith(f"from_bundle.py: error: {text}")
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert list(tmp_path.iterdir()) == [file]

    refused(f"{MODELS / 'fashion'}: makes clips; only a bundle of images", MODELS / "fashion", tmp_path / "back")
    refused(f"--out {tmp_path}/a\\nfile: is a file; expected a folder", MODELS / "demo-n1", file)


def test_checkpoints_that_are_there_stay_and_two_never_mix(
    tiny: Path, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.pt", "tokenizer.pt"):
        (tmp_path / name).write_text("of a training")
        assert script.main([str(tiny), "--out", str(tmp_path)]) == 2
        error = f"from_bundle.py: error: {tmp_path / name} exists; give another --out, or remove it where"
        assert capsys.readouterr().err.startswith(error)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "of a training"}
        (tmp_path / name).unlink()
    assert script.main([str(tiny), "--out", str(tmp_path / "whole")]) == 0
    sizes = sorted((tmp_path / "whole" / name).stat().st_size for name in ("model.pt", "tokenizer.pt"))
    capsys.readouterr()
    with full_disk(sum(sizes) // 2):  # room for one of them
        assert script.main([str(tiny), "--out", str(tmp_path / "full")]) == 2
    printed = capsys.readouterr()
    assert re.match(rf"from_bundle.py: error: {tmp_path}/full/\w+.pt is larger than this system", printed.err)
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert not list((tmp_path / "full").iterdir())
