"""The guidance interval through export and runtime: the tokens of the oracle, whose two halves run in every call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import golden_config, golden_weights
from par_export.bundle import ExportRequest, export
from par_export.errors import ExportError
from par_model.generation import generate
from par_model.transformer import PAR
from par_runtime import Pipeline

GREEDY: dict[str, Any] = {"guidance": 4.0, "greedy": True}
SAMPLED: dict[str, Any] = {"guidance": 3.0, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def oracles(golden: dict[str, dict[str, Any]]) -> dict[str, PAR]:
    """The models of the bundles ``n1``, ``fp32`` (n = 4) and ``n16``."""
    one, four = golden_config(golden["ar_n1_grid8"]), golden_config(golden["par_n4_grid8"])
    configs = {"n1": one, "fp32": four, "n16": replace(four, group_size=16)}
    return {name: golden_weights(PAR(config)) for name, config in configs.items()}


@pytest.mark.parametrize("interval", [0, 1, 5, 1000])
@pytest.mark.parametrize("name", ["n1", "fp32", "n16"])
def test_the_runtime_gives_the_oracles_tokens(
    name: str, interval: int, oracles: dict[str, PAR], bundles: dict[str, Path]
) -> None:
    wanted = [generate(oracles[name], [0, 3], guidance_interval=interval, **s).numpy() for s in (GREEDY, SAMPLED)]
    for device in ("cpu", "cpu-ort"):
        with Pipeline.load(bundles[name], device, threads=1, selftest=False) as pipeline:
            for settings, tokens in zip((GREEDY, SAMPLED), wanted, strict=True):
                made = pipeline.generate([0, 3], guidance_interval=interval, **settings, decode=False)
                assert (made.tokens == tokens).all()
                whole = pipeline.generate([0, 3], **settings, decode=False)
                assert (made.tokens == whole.tokens).all() == (interval == 1000)


@pytest.mark.parametrize("value", [-2, 1.5, float("nan"), "x"])
def test_a_bad_default_is_refused_before_any_work(tmp_path: Path, value: Any) -> None:
    request = ExportRequest(tmp_path / "none.pt", None, tmp_path / "b", defaults={"guidance_interval": value})
    text = r"default guidance_interval .*; expected a whole number, -1 .* or more"
    if isinstance(value, str):
        text = "default 'guidance_interval' is a str; expected a number"
    with pytest.raises(ExportError, match=text):
        export(request, say=lambda _: None)
