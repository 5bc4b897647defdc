"""The paper's ablations as options of ``parvis train``: they reach the model, its training and its images."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from par_model.checkpoint import open_checkpoint, par_config
from par_model.config import PARConfig, VQConfig
from par_model.generation import generate
from par_model.ordering import phases
from par_model.training.cli import transformer as train
from par_model.transformer import PAR
from par_model.vq import VQModel

pytestmark = pytest.mark.usefixtures("without_gpu")

#: Options -> what they change in the model's config, and the queries of its calls, of 16 tokens in groups of 4.
ABLATIONS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "": ({}, [1, 1, 1, 1, 4, 4, 4]),
    "--order distant": ({}, [1, 1, 1, 1, 4, 4, 4]),
    "--order raster": ({"order": "raster"}, [1, 1, 1, 1, 4, 4, 4]),
    "--parallel-initial": ({"sequential_initial": False}, [4, 4, 4, 4]),
    "--causal-groups": ({"causal_groups": True}, [1, 1, 1, 1, 4, 4, 4]),
    "--order raster --parallel-initial --causal-groups": (
        {"order": "raster", "sequential_initial": False, "causal_groups": True},
        [4, 4, 4, 4],
    ),
}
#: The raster places of the tokens of a 4x4 grid in distant order: one of each quarter, then their neighbours.
DISTANT = [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with codes of 12 images in 2 classes, which differ from place to place, and their tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    codes = (np.arange(16).reshape(4, 4) + rng.integers(2, size=(12, 4, 4))) % 16
    with (folder / "codes.npz").open("wb") as file:
        names = np.array(["a", "b"])
        np.savez(file, codes=codes.astype(np.uint16), labels=np.arange(12, dtype=np.uint8) % 2, class_names=names)
    torch.manual_seed(0)
    config = VQConfig(16, 4, channels=8, channel_multipliers=(1, 1), res_blocks=1, z_channels=8, norm_groups=4)
    torch.save({"model": VQModel(config).state_dict(), "config": asdict(config) | {"kind": "vq"}}, folder / "vq.pt")
    return folder


def options(given: Path, run: Path, ablation: str) -> list[str]:
    codes = str(given / "codes.npz")
    return [
        *["--codes", codes, "--val", codes, "--vocab", "16", "--dim", "16", "--layers", "1", "--heads", "2"],
        *["--batch", "12", "--lr", "0.03", "--dropout", "0", "--ema", "0", "--warmup", "0", "--report", "1"],
        *["--run", str(run), "--tokenizer", str(given / "vq.pt"), "--guidance", "2", *ablation.split()],
    ]


def opened(run: Path) -> PAR:
    """The model of a run."""
    checkpoint = open_checkpoint(run / "model.pt")
    config = par_config(checkpoint)
    assert config is not None
    model = PAR(config).eval()
    model.load_state_dict({key: checkpoint.tensor(key) for key in checkpoint.tensors})
    return model


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_reaches_the_model_its_training_and_its_images(given: Path, tmp_path: Path, ablation: str) -> None:
    assert train.main([*options(given, tmp_path / "run", ablation), "--steps", "6"]) == 0
    model = opened(tmp_path / "run")
    changes, queries = ABLATIONS[ablation]
    method = PARConfig(dim=16, n_layers=1, n_heads=2, vocab_size=16, n_classes=2, grid=(1, 4, 4), group_size=4)
    assert asdict(model.config) == asdict(method) | changes
    stored = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["config"]
    assert {name: stored[name] for name in ("order", "sequential_initial", "causal_groups")} == {
        "order": "distant",
        "sequential_initial": True,
        "causal_groups": False,
    } | changes
    assert [phase.query for phase in phases(model.config) for _ in range(phase.repeat)] == queries
    # It was trained on codes in this order: held out, they cost what the log says.
    order = list(range(16)) if "raster" in ablation else DISTANT
    with np.load(given / "codes.npz") as file:
        tokens = torch.from_numpy(file["codes"].reshape(12, 16)[:, order].astype(np.int64))
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens, labels).flatten(0, 1), tokens.flatten())
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["held_out"] == pytest.approx(float(loss), abs=0.01)  # computed in bf16 where that is fast
    assert last["held_out"] < 2  # of 16 codes all alike there are 2.77 nats
    # Its images are those of the reference, laid out in this order.
    greedy = generate(model, [0, 1], greedy=True)
    with torch.no_grad():
        assert (model(greedy, torch.tensor([0, 1])).argmax(-1) == greedy).all()
    assert len(greedy.unique()) > 4
    drawn = generate(model, [0, 1] * 4, guidance=2.0)
    raster = torch.empty_like(drawn)
    raster[:, order] = drawn
    vq = torch.load(given / "vq.pt", weights_only=True)
    decoder = VQModel(VQConfig(**{k: v for k, v in vq["config"].items() if k != "kind"})).eval()
    decoder.load_state_dict(vq["model"])
    with torch.no_grad():
        pixels = ((decoder.decode(raster.view(-1, 4, 4)).clamp(-1, 1) + 1) * 127.5).to(torch.uint8).numpy()
    with Image.open(tmp_path / "run" / "sheet-000006.png") as sheet:
        shown = np.asarray(sheet)
    expected = pixels.reshape(4, 2, 3, 8, 8).transpose(0, 3, 1, 4, 2).reshape(32, 16, 3)
    assert np.abs(shown.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("first", "then", "was", "now"),
    [
        ("", "--order raster", "--order distant", "--order raster"),
        ("--order raster", "", "--order raster", "--order distant"),
        ("", "--causal-groups", "no --causal-groups", "--causal-groups"),
        ("--causal-groups", "", "--causal-groups", "no --causal-groups"),
        ("", "--parallel-initial", "no --parallel-initial", "--parallel-initial"),
        (
            "--parallel-initial",
            "--causal-groups",
            "--parallel-initial, no --causal-groups",
            "no --parallel-initial, --causal-groups",
        ),
    ],
)
def test_a_run_is_not_resumed_with_another_ablation(
    given: Path, tmp_path: Path, first: str, then: str, was: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main([*options(given, run, first), "--steps", "1"]) == 0
    before = {path: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert train.main([*options(given, run, then), "--steps", "2", "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"parvis: error: --resume: the run in {run} was trained with {was}; given now: {now};")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert train.main([*options(given, run, first), "--steps", "2", "--resume"]) == 0


def test_an_unknown_order_is_one_line(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(options(given, tmp_path / "run", "--order spiral"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("parvis: error: argument --order: invalid choice: 'spiral' (choose from ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
