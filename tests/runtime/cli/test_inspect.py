"""``parvis inspect``: facts of bundles and checkpoints, and the bound of the paper's models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.cli.inspect import describe
from par_runtime.cost.architecture import Architecture, phases_of
from par_runtime.cost.bound import bound
from par_runtime.cost.memory import cache_bytes
from par_runtime.cost.work import image_work


@pytest.mark.parametrize(
    ("sizes", "millions", "wanted_ms"),
    [
        ((1024, 24, 16, 2816, 4), 325.1, 52),  # PAR-L-4x, and so on: the figures of the paper's model on 2.0 TB/s
        ((1280, 36, 20, 3584, 4), 752.4, 118),
        ((1536, 48, 24, 4096, 4), 1384, 216),
        ((3200, 24, 32, 8704, 4), 3041, 460),
        ((3200, 24, 32, 8704, 16), 3041, 158),
    ],
)
def test_the_bound_of_the_published_models(sizes: tuple[int, ...], millions: float, wanted_ms: float) -> None:
    names = ("dim", "n_layers", "n_heads", "ffn_dim")
    model = dict(zip(names, sizes, strict=False))
    head_dim = model["dim"] // model["n_heads"]  # as it is, not padded
    model |= {"head_dim_padded": head_dim, "vocab_size": 16384}
    architecture = Architecture.of_model(model, phases_of(sizes[-1], 576))

    def bound_ms(images: int) -> float:
        return bound(image_work(architecture, images, True, 2, 2), 2000, None).ms

    assert architecture.step_parameters / 1e6 == pytest.approx(millions, rel=2e-3)
    assert bound_ms(1) == pytest.approx(wanted_ms, rel=0.02)
    assert bound_ms(8) > bound_ms(1)
    assert cache_bytes(architecture, 2, True, 2) == 2 * cache_bytes(architecture, 1, True, 2)


def test_the_memory_of_a_bundle_is_that_of_its_cache(tiny: Path) -> None:
    """The architecture gives the size of the buffers that the manifest describes, and of the weights that a call
    reads.
    """
    bundle = Bundle.open(tiny)
    cache = bundle.cache
    numbers = 2 * len(cache.inputs) * cache.heads * bundle.n_tokens * cache.head_dim  # two rows of a guided image
    architecture = Architecture.of_model(bundle.model, bundle.phases)
    assert cache_bytes(architecture, 1, True, 4) == numbers * 4
    assert describe(bundle)["memory_bytes"]["8"]["cpu"] == (architecture.step_parameters + 8 * numbers) * 4


def test_a_bundle_as_text_and_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tiny), "--selftest"]) == 0
    text = capsys.readouterr().out
    assert "28,912 parameters: width 16, 2 layers, 2 heads of 8, 64 codes, 6 classes (6 named)" in text
    assert "64 tokens in 19 calls (1 prefill, 3 sequential, 1 transition, 14 group), 16x16 pixels" in text
    assert "128 tokens, passed on onnxruntime-cpu" in text
    assert "memory    of weights and cache, guided, on a CPU and a GPU: 1 image 143.7 kB and 71.8 kB, 2 images " in text
    assert "engine    none; 'parvis build' makes them" in text
    assert cli.main(["inspect", str(tiny), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["hash"] == Bundle.open(tiny).hash
    assert facts["selftest"]["state"].startswith("not run")
    assert facts == json.loads(json.dumps(describe(Bundle.open(tiny))))


def test_checkpoints(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert cli.main(["inspect", str(checkpoints["par_n4_grid8"])]) == 0
    text = capsys.readouterr().out
    assert "PAR model" in text
    assert "open: width 64 with 3 layers is none of the named sizes" in text
    assert cli.main(["inspect", str(checkpoints["par_n4_grid8"]), "--heads", "4", "--grid", "8"]) == 0
    text = capsys.readouterr().out
    assert "open:" not in text
    assert "calls" in text
    assert " MB" in text.partition("memory")[2]
    assert cli.main(["inspect", str(checkpoints["par_n4_grid8"]), "--heads", "4", "--grid", "8x"]) == 2
    assert "--grid '8x': expected L, HxW or TxHxW" in capsys.readouterr().err
    assert cli.main(["inspect", str(checkpoints["vq"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "VQ tokenizer"


@pytest.mark.parametrize("option", [["--grid", "16"], ["--heads", "4"], ["--weights", "ema"]])
def test_what_is_for_a_checkpoint_is_refused_for_a_bundle(
    option: list[str], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tiny), *option]) == 2
    assert f"{' '.join(option)}: is for a checkpoint; {tiny} is none; leave it out" in capsys.readouterr().err


def test_what_is_neither_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_bytes(b"nothing")
    assert cli.main(["inspect", str(tmp_path / "x.pt")]) == 2
    assert capsys.readouterr().err.startswith("parvis: error: ")
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert "holds no manifest.json, so it is not a bundle" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
