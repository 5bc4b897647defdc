"""Bundles of random weights: exact shapes, one weights file for several n, and a mark that they are not trained."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from par_export.graphs.writer import WeightTable
from par_export.quantised import Codes, nearest
from par_export.random_bundle import NoTensors, RandomTensors, parameters, write_family, write_like, write_published
from par_export.restored import read_weights
from par_model.config import PARConfig, VQConfig, named
from par_model.generation import generate
from par_model.ordering import rotary_table
from par_model.transformer import PAR
from par_runtime import Bundle, BundleError, Pipeline
from par_runtime.bundle import WEIGHTS
from par_runtime.cli import dispatch as cli

SMALL = PARConfig(dim=64, n_layers=2, n_heads=4, vocab_size=256, n_classes=10, grid=(1, 8, 8))
VQ = VQConfig(codebook_size=256, channels=32, channel_multipliers=(1, 2), res_blocks=1, z_channels=32)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return write_family(SMALL, (1, 4, 16), tmp_path_factory.mktemp("random"), name="small", vq=VQ)


def test_bundles_of_every_n_share_one_file(three: dict[int, Path]) -> None:
    assert {n: path.name for n, path in three.items()} == {1: "small-n1", 4: "small-n4", 16: "small-n16"}
    assert len({os.stat(path / WEIGHTS).st_ino for path in three.values()}) == 1
    assert [name for name in os.listdir(three[1].parent) if name.startswith(".")] == []


@pytest.mark.parametrize("n", [1, 4, 16])
def test_each_is_a_whole_bundle_that_runs(three: dict[int, Path], n: int) -> None:
    bundle = Bundle.open(three[n], "full")
    assert (bundle.group_size, bundle.calls) == (n, {1: 64, 4: 19, 16: 19}[n])
    with Pipeline.load(three[n], device="cpu", threads=1, selftest=False) as pipeline:
        result = pipeline.generate([1, 2], seed=3)
    assert result.images is not None
    assert result.images.shape == (2, 16, 16, 3)
    assert len(np.unique(result.tokens)) > 20  # draws from a flat distribution, not one code


@pytest.mark.parametrize("n", [1, 4, 16])
def test_its_tokens_are_those_of_a_model_with_these_weights(three: dict[int, Path], n: int) -> None:
    """Read back into the oracle: the shared file holds every n's rotary table where its graphs refer to it."""
    import torch

    table = WeightTable.read(three[n] / "step.onnx").entries
    raw = np.fromfile(three[n] / WEIGHTS, np.uint8)

    def tensor(name: str) -> torch.Tensor:
        at = table[name]
        return torch.from_numpy(raw[at.offset : at.offset + at.length].copy().view(np.float32)).view(at.shape)

    config = replace(SMALL, group_size=n)
    cos, sin = rotary_table(config)
    assert np.array_equal(tensor("cos").numpy(), cos)
    assert np.array_equal(tensor("sin").numpy(), sin)
    embed = tensor("embed")
    state = {
        "tok_embeddings.weight": embed[:256],
        "cls_embedding.embedding_table.weight": embed[256:267],
        "norm.weight": tensor("norm"),
        "output.weight": tensor("output").T,
    }
    if n > 1:
        state["spe_tok_embeddings.special_embeddings.weight"] = embed[267 : 267 + n - 1]
    for i in range(SMALL.n_layers):
        layer = f"layers.{i}"
        w1, w3 = tensor(f"{layer}.w13").T.chunk(2)
        state |= {
            f"{layer}.attention.wqkv.weight": tensor(f"{layer}.wqkv").T,
            f"{layer}.attention.wo.weight": tensor(f"{layer}.wo").T,
            f"{layer}.feed_forward.w1.weight": w1,
            f"{layer}.feed_forward.w3.weight": w3,
            f"{layer}.feed_forward.w2.weight": tensor(f"{layer}.w2").T,
            f"{layer}.attention_norm.weight": tensor(f"{layer}.attention_norm"),
            f"{layer}.ffn_norm.weight": tensor(f"{layer}.ffn_norm"),
        }
    model = PAR(config)
    model.load_state_dict(state)
    with Pipeline.load(three[n], device="cpu", threads=1, selftest=False) as pipeline:
        ours = pipeline.generate([0, 5], guidance=2.0, greedy=True, decode=False).tokens
    assert (generate(model.eval(), [0, 5], guidance=2.0, greedy=True).numpy() == ours).all()


def test_random_weights_have_no_self_test_and_no_encoder(
    three: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match=r"holds random weights, for benchmarks, and no self-test; selftest=False"):
        Pipeline.load(three[4], device="cpu")
    assert cli.main(["inspect", str(three[4]), "--selftest"]) == 2  # which has no option --no-selftest
    assert capsys.readouterr().err.endswith("holds random weights, for benchmarks, and no self-test\n")
    Image.new("RGB", (80, 60)).save(photo := tmp_path / "photo.png")
    assert cli.main(["reconstruct", str(photo), "--bundle", str(three[4]), "--out", str(tmp_path / "a.png")]) == 2
    said = "no encoder, so it cannot turn images into tokens; it holds random weights, for benchmarks: take a bundle"
    assert said in capsys.readouterr().err
    assert Bundle.open(three[4]).parity == {"random_weights": True}


def test_layers_differ(three: dict[int, Path]) -> None:
    """TensorRT keeps equal weights once, so equal layers would make a plan too small and too fast."""
    table = WeightTable.read(three[4] / "step.onnx").entries
    raw = (three[4] / WEIGHTS).read_bytes()
    parts = [
        raw[at.offset : at.offset + at.length]
        for name, at in table.items()
        if name.endswith((".wqkv", ".w2", ".wo", ".w13"))
    ]
    assert len(parts) == 8
    assert len(set(parts)) == 8


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bundle_like_another(precision: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    path = write_like(bundles[precision], 1, tmp_path)
    twin, given = Bundle.open(path), Bundle.open(bundles[precision])
    assert (twin.group_size, twin.calls) == (1, 64)
    assert (twin.precision, twin.grid, twin.image_size, twin.defaults) == (
        precision,
        given.grid,
        given.image_size,
        given.defaults,
    )
    assert twin.model["parameters"] == given.model["parameters"] - 3 * given.model["dim"]


def test_a_bundle_like_another_keeps_its_ablations(tmp_path: Path) -> None:
    raster = replace(SMALL, group_size=4, order="raster", sequential_initial=False)
    given = write_family(raster, (4,), tmp_path, name="raster", vq=VQ)[4]
    twin = Bundle.open(write_like(given, 16, tmp_path / "out"))
    assert list(twin.order) == list(range(64))
    assert [(phase.name, phase.query, phase.repeat) for phase in twin.phases] == [
        ("transition", 16, 1),
        ("group", 16, 3),
    ]


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no manifest\.json, so it is not a bundle"):
        write_like(tmp_path, 1, tmp_path / "out")
    with pytest.raises(BundleError, match="group_size=9"):
        write_like(tiny, 9, tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "n", "wanted"),
    [
        ("B", 4, 110_890_752),
        ("L", 4, 342_914_048),
        ("XL", 4, 774_703_360),
        ("XXL", 4, 1_410_977_280),
        ("3B", 4, 3_096_668_800),
    ],
)
def test_published_models_have_the_published_number_of_parameters(size: str, n: int, wanted: int) -> None:
    assert parameters(named(size, group_size=n)) == wanted


def test_the_papers_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from par_export import random_bundle

    asked = {}
    monkeypatch.setattr(
        random_bundle, "write_family", lambda config, sizes, folder, **more: asked.update(config=config, **more) or {}
    )
    write_published("PAR-XL", (1, 4), tmp_path)
    assert (asked["config"].dim, asked["config"].n_tokens, asked["vq"]) == (1280, 576, VQConfig())
    write_published("PAR-video", (1, 4, 16), tmp_path)
    assert (asked["config"].n_tokens, asked["config"].vocab_size) == (1280, 64000)
    assert (asked["vq"], asked["defaults"]["guidance"], asked["defaults"]["top_k"]) == (None, 1.15, 8000)
    with pytest.raises(ValueError, match="unknown size 'XS'"):
        write_published("PAR-XS", (1,), tmp_path)


def test_a_hollow_bundle_has_holes_for_matrices_and_the_same_places(tmp_path: Path) -> None:
    config = replace(SMALL, dim=400)  # heads of 100
    made = {
        hollow: write_family(
            config,
            [1, 4],
            tmp_path / str(hollow),
            name="x",
            precision="fp16",
            vq=VQ,
            tensors=NoTensors if hollow else RandomTensors,
        )
        for hollow in (False, True)
    }
    full, hollow = (Bundle.open(made[h][4], verify="full") for h in (False, True))
    assert full.weights == hollow.weights
    file, other = (b.path / WEIGHTS for b in (full, hollow))
    assert file.stat().st_size == other.stat().st_size
    assert file.stat().st_blocks > 2 * other.stat().st_blocks
    data, numbers = (np.fromfile(f, np.uint8) for f in (other, file))
    for name, at in hollow.weights.items():
        part = data[at.offset : at.offset + at.length]
        if name in ("cos", "sin", "norm") or name.endswith("_norm"):
            assert (part == numbers[at.offset : at.offset + at.length]).all()
            assert part.any()
        else:
            assert not part.any(), name


def test_a_quantised_one_holds_the_nearest_codes_of_the_same_weights(tmp_path: Path) -> None:
    """In groups of 128 only w2, which has 256 rows, has whole ones: the calibration names the others."""
    plain, coded = (
        Bundle.open(write_family(SMALL, (4, 16), tmp_path, name=str(codes), precision="fp16", codes=codes)[4], "full")
        for codes in (None, Codes("int4", 128))
    )
    assert coded.calibration is not None
    assert (coded.quantised, coded.calibration.group, coded.precision) == ("int4", 128, "fp16")
    kept = {"output", *(f"layers.{i}.{name}" for i in range(2) for name in ("wqkv", "wo", "w13"))}
    assert set(coded.calibration.kept) == kept
    before, after = read_weights(plain), read_weights(coded)
    assert before.keys() == after.keys()
    for name, numbers in before.items():
        wanted = numbers.float().numpy()
        if name.endswith(".w2"):
            wanted = nearest(wanted, "int4", 128).dequantised()
        np.testing.assert_array_equal(after[name].float().numpy(), wanted, err_msg=name)
    one, other = (
        Pipeline.load(coded.path, device, selftest=False).generate([3], seed=1, decode=False).tokens
        for device in ("cpu", "cpu-ort")
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_bundles_of_random_weights_are_written_without_onnxruntime() -> None:
    script = "import sys; sys.modules['onnxruntime'] = None; import par_export.random_bundle, par_export.card.reference"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["PAR-L-512", "PAR-M"])
def test_a_model_that_was_never_published_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        write_published(name, [4], tmp_path)
