"""``parvis inspect`` of a checkpoint: what it is, what its bundle will need, and the least time for an image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from video_bundles import write_checkpoints

from par_model.config import named
from par_model.transformer import PAR
from par_runtime.cli import dispatch as cli
from par_runtime.cost.architecture import named_architecture
from par_runtime.cost.bound import bound
from par_runtime.cost.data_sheets import DATA_SHEETS
from par_runtime.cost.work import image_work


def test_a_video_tokenizer_and_a_video_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = write_checkpoints(tmp_path)
    assert cli.main(["inspect", str(tokenizer), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "video tokenizer"
    assert facts["config"]["codes"] == 12
    assert (facts["config"]["frames per latent frame"], facts["config"]["pixels per code"]) == (2, "2x2")
    assert cli.main(["inspect", str(model)]) == 0
    text = capsys.readouterr().out
    assert "calls per clip       51\n" in text
    assert "1 clip " in text
    assert "for one guided clip without decoding" in text


def test_a_complete_checkpoint_and_the_needs_of_its_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        state = PAR(named("B", n_classes=3, vocab_size=64)).state_dict()
    numbers = {key: torch.zeros(tensor.shape, dtype=torch.float16) for key, tensor in state.items()}
    torch.save({"model": numbers, "args": argparse.Namespace(image_size=256, downsample_size=16)}, tmp_path / "c.pt")
    for where in (tmp_path / "c.pt", tmp_path):  # and the folder that holds it
        assert cli.main(["inspect", str(where), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["config"]["grid"] == "1x16x16 (the file's args: image_size 256 / 16)"
        assert facts["config"]["heads"] == "12 of 64 (size B)"
        assert facts["config"]["calls per image"] == 4 + 256 // 4 - 1
        assert facts["files"] == {"c.pt": (tmp_path / "c.pt").stat().st_size}
        architecture = named_architecture("PAR-B", 4, 256, 64)
        wanted = bound(image_work(architecture, 1, True, 2, 2), DATA_SHEETS["A100-80"].gb_s, None).ms
        assert facts["bound_ms"]["A100-80"] == pytest.approx(wanted)
        need = facts["memory_bytes"]
        cache = 2 * 12 * 2 * 768 * 256 * 4  # layers, rows, k and v, width, tokens, bytes
        assert need["2"]["fp32"] - need["1"]["fp32"] == cache
    assert cli.main(["inspect", str(tmp_path / "c.pt")]) == 0
    text = capsys.readouterr().out
    assert "bound                at least, in fp16 by memory bandwidth" in text
    assert "in fp32 (a CPU) and fp16: 1 image " in text
