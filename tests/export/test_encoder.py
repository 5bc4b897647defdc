"""The encoder and the fp16 decoder of a bundle, and the parity gate of the tokenizer's graphs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from conftest import GOLDEN, golden_weights
from par_export import parts
from par_export.bundle import ExportRequest, export
from par_export.cli import export as cli
from par_export.errors import ParityError
from par_export.gate import tokenizer as tokenizer_gate
from par_export.gate.runner import session
from par_model.config import PARConfig, VQConfig
from par_model.transformer import PAR
from par_model.vq import VQModel
from par_runtime import Pipeline, system
from par_runtime.images import png


def smooth_images(count: int, size: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, size // 4, size // 4, 3), np.uint8)
    return coarse.repeat(4, 1).repeat(4, 2)


@torch.no_grad()
def test_the_encoder_gives_the_oracles_tokens_in_sequence_order(bundles: dict[str, Path], small_vq: VQModel) -> None:
    images = smooth_images(3, 16, 1)
    pipeline = Pipeline.load(bundles["fp32"], device="cpu", threads=1)
    got = pipeline.grid_tokens(pipeline.encode(images))
    wanted = small_vq.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).numpy()
    assert got.shape == wanted.shape == (3, 8, 8)
    assert (got == wanted).mean() > 0.99  # two codes may be equally near
    assert len(np.unique(got)) > 20
    np.testing.assert_array_equal(pipeline.encode(images[1])[0], pipeline.encode(images)[1])


def test_encoded_tokens_are_in_the_order_of_generated_ones(bundles: dict[str, Path]) -> None:
    """An image that keeps all encoded tokens is the decoder's image of these tokens: nothing is permuted twice."""
    pipeline = Pipeline.load(bundles["fp32"], device="cpu", threads=1)
    tokens = pipeline.encode(smooth_images(2, 16, 5))
    again = pipeline.generate([0, 1], keep=np.ones((8, 8), bool), tokens=tokens)
    np.testing.assert_array_equal(again.images, pipeline.decode(tokens))
    assert again.kept is not None
    assert again.kept.all()


def test_the_manifest_holds_the_rounding_error_of_every_precision(bundles: dict[str, Path]) -> None:
    for precision in ("fp32", "fp16", "bf16"):
        manifest = json.loads((bundles[precision] / "manifest.json").read_text())
        parity = manifest["parity"]
        assert parity["encoder"]["tokens"] == 64
        assert ("rounding" in parity["encoder"]) == (precision != "fp32")
        assert parity["decoder_fp16"]["psnr_db"] > 40
        assert manifest["graphs"]["decoder_fp16"]["file"] == "decoder_fp16.onnx"
        assert manifest["graphs"]["encoder"]["inputs"][0]["shape"] == ["B", 16, 16, 3]
    half = onnx.load(bundles["fp32"] / "decoder_fp16.onnx", load_external_data=False)
    assert {n.op_type for n in half.graph.node} >= {"Conv", "Cast"}
    images = [
        session(bundles["fp32"] / f"{name}.onnx").run(None, {"tokens": np.zeros((1, 64), np.int64)})[0]
        for name in ("decoder", "decoder_fp16")
    ]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 4


def test_a_bundle_without_an_encoder(
    checkpoints: dict[str, Path], bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", checkpoints["par_n4_grid8"], "--tokenizer", checkpoints["vq"], "--out", tmp_path / "b"]
    assert cli.main([*map(str, arguments), "--heads", "4", "--grid", "8", "--no-encoder"]) == 0
    out = tmp_path / "b"
    assert not (out / "encoder.onnx").exists()
    assert (out / "weights.data").stat().st_size < (bundles["fp32"] / "weights.data").stat().st_size - 100_000
    from par_runtime.cli import dispatch as parvis

    capsys.readouterr()
    image = tmp_path / "x.png"
    system.write_beside(image, lambda part: png.Image.new("RGB", (16, 16), "red").save(part, format="PNG"))
    assert parvis.main(["reconstruct", str(image), "--bundle", str(out), "--out", str(tmp_path / "y.png")]) == 2
    said = (
        "has no encoder, so it cannot turn images into tokens; take a bundle that has one, or export it again without"
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "y.png").exists()


def test_the_gate_refuses_an_encoder_with_another_token_order(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = parts.encoder_graph

    def upside_down(*arguments: Any) -> Any:
        graph = right(*arguments)
        order = graph.initializers["order"]
        reversed_order = onnx.numpy_helper.to_array(order)[::-1].copy()
        order.CopyFrom(onnx.numpy_helper.from_array(reversed_order, "order"))
        return graph

    monkeypatch.setattr(parts, "encoder_graph", upside_down)
    request = ExportRequest(checkpoints["par_n4_grid8"], checkpoints["vq"], tmp_path / "b", heads=4, grid=(1, 8, 8))
    with pytest.raises(
        ParityError, match=r"encoder\.onnx: token \d+ is code \d+, which is .* further than the oracle's"
    ):
        export(request, say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_an_inexact_fp16_decoder_is_left_out_and_the_bundle_is_still_written(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_gate, "HALF_MIN_PSNR_DB", 1000.0)
    request = ExportRequest(checkpoints["par_n4_grid8"], checkpoints["vq"], tmp_path / "b", heads=4, grid=(1, 8, 8))
    manifest = json.loads((export(request, say=lambda _: None) / "manifest.json").read_text())
    assert manifest["parity"]["decoder_fp16"]["left_out"] is True
    assert "decoder_fp16" not in manifest["graphs"]
    assert not (tmp_path / "b" / "decoder_fp16.onnx").exists()
    assert "encoder" in manifest["graphs"]
    assert Pipeline.load(tmp_path / "b", device="cpu").generate(0, seed=1).images is not None


def test_a_rounded_codebook_is_normalised_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A stored code that is longer than 1 must not be chosen more often, though its products are larger."""
    shutil.copytree(bundles["fp32"], tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "encoder.onnx", load_external_data=False)
    entry = next(t for t in model.graph.initializer if t.name == "vq.codebook")
    offset = next(int(e.value) for e in entry.external_data if e.key == "offset")
    data = np.memmap(tmp_path / "b" / "weights.data", np.float32, "r+", offset=offset, shape=tuple(entry.dims))
    images = smooth_images(1, 16, 7)
    before = session(bundles["fp32"] / "encoder.onnx").run(None, {"images": images})[0]
    data[3] *= 2
    data.flush()
    after = session(tmp_path / "b" / "encoder.onnx").run(None, {"images": images})[0]
    assert (before == after).mean() > 0.98


def peak_bytes(bundle: Path) -> int:
    """Peak memory of a process that decodes and encodes 8 images of ``bundle``, encoder and decoder loaded."""
    code = (
        "import sys, numpy as np; from par_runtime.bundle import Bundle; from par_runtime.tokenizer import Tokenizer;"
        "t = Tokenizer(Bundle.open(sys.argv[1])); t.encode(t.decode(np.zeros((8, t.bundle.n_tokens), int)));"
        # Not ru_maxrss, which counts the memory of the parent at the fork.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    child = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=True)
    return 1024 * int(child.stdout)


@pytest.fixture(scope="module")
def vq16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints: a small model of 384 px, and VQ-16 at its full size with golden weights."""
    folder = tmp_path_factory.mktemp("vq16")
    config = PARConfig(dim=32, n_layers=1, n_heads=2, vocab_size=16384, n_classes=2, grid=(1, 24, 24), group_size=4)
    torch.save(golden_weights(PAR(config)).state_dict(), folder / "c.pt")
    tokenizer = golden_weights(VQModel(VQConfig()))
    assert (
        sum(p.numel() for name, p in tokenizer.state_dict().items() if name != "quantize.codebook_used") == 71_883_403
    )
    torch.save(tokenizer.state_dict(), folder / "v.pt")
    return folder / "c.pt", folder / "v.pt"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_eight_images_of_384_px_stay_below_2_gb(tmp_path: Path, vq16: tuple[Path, Path], precision: str) -> None:
    bundle = export(ExportRequest(*vq16, tmp_path / "b", precision, heads=2, grid=(1, 24, 24)), say=lambda _: None)
    assert peak_bytes(bundle) < 2e9


@pytest.mark.slow
def test_vq16_encoder_gives_the_golden_tokens(tmp_path: Path, vq16: tuple[Path, Path]) -> None:
    request = ExportRequest(*vq16, tmp_path / "b", heads=2, grid=(1, 24, 24))
    pipeline = Pipeline.load(export(request, say=lambda _: None), device="cpu", selftest=False)
    y, x = np.mgrid[0:384, 0:384].astype(np.float32) / 384
    image = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y - 2 * x), np.sin(20 * x * y)], -1)
    pixels = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    got = pipeline.grid_tokens(pipeline.encode(pixels)).reshape(-1)
    with np.load(GOLDEN / "vq16_grid24.npz") as g:
        assert (got == g["encoded"]).mean() > 0.9  # the golden image was not rounded to 8 bits
