"""Fixtures of the tests of harmful and damaged checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import golden_weights
from par_model.config import PARConfig
from par_model.transformer import PAR
from par_runtime.cli import dispatch as cli

State = dict[str, torch.Tensor]
CONFIG = {"n_heads": 2, "grid": (1, 4, 4)}
VICTIM = "victim"  # a folder that code from a file would make, if it ran


@pytest.fixture(scope="module")
def state() -> State:
    model = PAR(PARConfig(dim=32, n_layers=2, n_heads=2, vocab_size=20, n_classes=3, grid=(1, 4, 4), group_size=4))
    return {key: value.contiguous() for key, value in golden_weights(model).state_dict().items()}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Check that both verbs end in one line with ``message``, write no bundle and run nothing."""
    monkeypatch.chdir(tmp_path)

    def check(path: Path, message: str, *options: str) -> None:
        for verb in ("inspect", "export"):
            arguments = (
                [str(path)] if verb == "inspect" else ["--checkpoint", str(path), "--tokenizer", "none", "--out", "b"]
            )
            assert cli.main([verb, *arguments, *(options if verb == "export" else ())]) == 2, (verb, path)
            out, error = capfd.readouterr()
            assert out == ""
            assert error.startswith("parvis: error: ")
            assert error.count("\n") == 1, error
            assert message in error
            assert "safe_globals" not in error  # torch's advice to allow it is not passed on
            assert "weights_only" not in error
            assert not (tmp_path / "b").exists()
            assert not (tmp_path / VICTIM).exists()

    return check


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "c.pt", **options)
    return folder / "c.pt"
