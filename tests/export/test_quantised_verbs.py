"""The verbs of ``parvis`` on quantised bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

from par_export.quantised import quantised_with, write_bundle
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch as cli
from par_runtime.cli.inspect import describe
from par_runtime.cost.architecture import Architecture
from par_runtime.cost.memory import cache_bytes


def test_inspect_says_what_was_calibrated(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Bundle.open(bundles["fp16"])
    calibration = {"weights": "int4", "group": 32, "arithmetic": "int8", "cache": "bf16"}
    measured = {"measures": {"top1": 0.98765, "kl": 0.001}, "images": 16}
    quantise = quantised_with("int4", 32, "float16", kept=("output",))
    path = write_bundle(
        source, tmp_path / "q", quantise, calibration, gate=False, decide=lambda _: {"report": measured}, say=str
    )
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    bundle = Bundle.open(path)
    assert source.weight_bytes > bundle.weight_bytes > 0.5
    assert (
        f"weights   int4 (group 32), {bundle.weight_bytes:.3g} bytes a parameter; kept: output; on a CPU multiplied in "
        f"int8, keys and values in bf16; made from {source.hash[:12]}\n"
        "report    top1 0.9877, kl 0.001\n"
    ) in text
    facts, whole = describe(bundle), describe(source)
    assert facts["calibration"]["kept"] == ("output",)
    architecture = Architecture.of_model(bundle.model, bundle.phases)
    for where, number_bytes in (("cpu", 2), ("gpu", 2)):
        assert facts["memory_bytes"]["2"][where] == int(
            architecture.step_parameters * bundle.weight_bytes + cache_bytes(architecture, 2, True, number_bytes)
        )
    assert facts["bound_ms"]["H100"] < whole["bound_ms"]["H100"]
