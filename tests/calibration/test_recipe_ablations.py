"""The recipe's comparison of ablations: what its figures mean, its files, and models that do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_scripts import STYLES, raw_folder, scripts

from par_model.config import PARConfig
from par_model.generation import generate
from par_model.ordering import token_order
from par_model.transformer import PAR
from par_runtime.bundle import Bundle
from par_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"
MODELS: dict[str, dict[str, Any]] = {"n4": {}, "causal": {"causal_groups": True}, "raster": {"order": "raster"}}


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    """``ablations.py``."""
    with scripts("ablations") as (module,):
        yield module


def trained(folder: Path, vocab: int = 1024, names: list[str] = STYLES, **ablation: Any) -> PAR:
    """A random model as ``parvis train`` leaves it in ``folder``."""
    torch.manual_seed(len(folder.name))
    config = PARConfig(dim=16, n_layers=1, n_heads=1, vocab_size=vocab, n_classes=12, grid=(1, 16, 16), **ablation)
    model = PAR(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.2)
    folder.mkdir()
    content = {"model": model.state_dict(), "config": asdict(config) | {"kind": "par"}, "class_names": names}
    torch.save(content, folder / "model.pt")
    return model


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Twenty-four real drawings, two of each class, in a raw folder, and their codes in raster order."""
    bundle = Bundle.open(DEMO)
    with np.load(DEMO / "heldout.npz") as stored:
        tokens = stored["tokens"][:24].astype(np.int64)
    tokenizer = Tokenizer(bundle)
    images = tokenizer.decode(tokens)
    codes = np.empty_like(tokens)
    codes[:, list(bundle.order)] = tokenizer.encode(images)
    tokenizer.close()
    return raw_folder(tmp_path_factory.mktemp("real") / "val", images, np.arange(24) % 12), codes


def test_the_table_is_of_each_models_own_order_and_calls(
    recipe: ModuleType, held_out: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, codes = held_out
    train = raw_folder(tmp_path / "train", np.zeros((12, 64, 64, 3), np.uint8), np.arange(12))
    models = {name: trained(tmp_path / name, **ablation) for name, ablation in MODELS.items()}
    out, sheet = tmp_path / "table.jsonl", tmp_path / "sheet.png"
    command = [str(DEMO), "--held-out", str(val), "--train", str(train), "--out", str(out), "--sheet", str(sheet)]
    command += ["--generated", "2", "--shown", "3", "--guidance", "1", "--top-p", "1"]
    files = [str(tmp_path / name / "model.pt") for name in MODELS]
    assert recipe.main([*command, "--models", *files]) == 0, capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    labels = torch.arange(24) % 12
    nats = []
    for model in models.values():
        tokens = torch.from_numpy(codes[:, token_order(model.config)])
        with torch.no_grad():
            logits = model.teacher_forced(tokens, labels)
        nats.append(-logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0].double().numpy())
    for row, own in zip(rows, nats, strict=True):
        assert row["nats"] == pytest.approx(own.mean(), rel=1e-5)
        assert row["first"] == pytest.approx(own[:, :4].mean(), rel=1e-5)
        assert (row["calls"], row["images"], row["n"]) == (67, 24, 4)
    assert [row["name"] for row in rows] == list(MODELS)
    assert [(row["order"], row["causal_groups"]) for row in rows] == [
        ("distant", False), ("distant", True), ("raster", False)
    ]  # fmt: skip
    assert rows[0]["change"] is None
    assert rows[2]["change"] == pytest.approx(nats[2].mean() - nats[0].mean(), rel=1e-4)
    assert rows[2]["low"] < rows[2]["change"] < rows[2]["high"]
    assert all(row["compared"]["distance"] > row["compared"]["margin"] for row in rows)  # images of random weights
    with Image.open(sheet) as picture:
        shown = np.asarray(picture)
    assert shown.shape == (4 * 64, 3 * 64, 3)
    raster = np.empty((1, 256), np.int64)
    raster[:, token_order(models["raster"].config)] = generate(models["raster"], [0, 1], guidance=1.0, seed=0)[
        :1
    ].numpy()
    bundle = Bundle.open(DEMO)
    tokenizer = Tokenizer(bundle)
    image = tokenizer.decode(raster[:, list(bundle.order)])[0]
    tokenizer.close()
    np.testing.assert_array_equal(shown[-64:, :64], image)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[3] == ["model", "calls", "nats", "change", "first", "distance", "spread"]
    assert printed[6][:4] == ["raster", "67", f"{rows[2]['nats']:.3f}", f"{rows[2]['change']:+.3f}"]


def test_what_does_not_fit_is_said_and_nothing_is_written(
    recipe: ModuleType, held_out: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val, _ = held_out
    train = raw_folder(tmp_path / "train", np.zeros((12, 64, 64, 3), np.uint8), np.arange(12))
    trained(tmp_path / "good")
    trained(tmp_path / "few-codes", vocab=1000)
    trained(tmp_path / "other-classes", names=[*STYLES[:11], "thumb"])
    good, out = str(tmp_path / "good" / "model.pt"), tmp_path / "table.jsonl"
    for models, more, message in (
        ([str(tmp_path / "few-codes" / "model.pt")], [], "has grid, codes and classes ((1, 16, 16), 1000, 12)"),
        ([good, str(tmp_path / "other-classes" / "model.pt")], [], "class 11 is 'thumb', not 'thumbs' as in"),
        ([str(tmp_path / "none.pt")], [], "none.pt"),
        ([good], ["--generated", "1"], "--generated 1: expected"),
        ([good], ["--top-p", "0"], "--top-p 0.0: expected"),
        ([good], ["--out", str(val / "table.jsonl")], "would write"),
        ([good], ["--sheet", str(out)], "table.jsonl"),
        ([good], ["--out", good], f"--out {good}: would write"),
        ([good], ["--sheet", good], f"--sheet {good}: would write"),
        ([good], ["--each", "1"], "12 held-out images and --generated 40 of 12 classes: a distance takes 16 images"),
        ([good], ["--shown", "101"], "--shown 101: expected"),
    ):
        command = [str(DEMO), "--held-out", str(val), "--train", str(train), "--out", str(out), *more]
        assert recipe.main([*command, "--models", *models]) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
