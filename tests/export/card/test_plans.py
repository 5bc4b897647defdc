"""The part ``tensorrt-rtx``: which plan is kept of those that are tried."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from par_export.card import libraries
from par_runtime.backends.engines import ENGINES


@pytest.mark.parametrize(
    ("passes", "kept"), [(("SM90", "local"), "local"), (("SM90",), "SM90"), (("local",), "local"), ((), None)]
)
def test_the_plan_that_was_accepted_last_is_the_one_that_is_checked(
    passes: tuple[str, ...], kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, found = tmp_path / "demo", []
    bundle.mkdir()

    def run_stage(name: str, spec: dict[str, Any], until: float) -> tuple[str, Any]:
        if name == "plan":
            assert not (bundle / ENGINES).exists()
            (bundle / ENGINES).mkdir()
            (bundle / ENGINES / "plan").write_text(spec["target"])
        else:
            found.append((bundle / ENGINES / "plan").read_text())
        return name, spec

    def take(title: str, ended: tuple[str, Any]) -> None:
        passed = ended[0] != "plan" or ended[1]["target"] in passes
        session.lines.append({"kind": "check", "name": title, "passed": passed})

    session: Any = SimpleNamespace(
        options=SimpleNamespace(device=0, images=(1,), stress=1), device="cuda:0", lines=[], take=take, left=0.0,
        end=time.monotonic(), share=lambda part: part, progress=lambda text: None, leave_out=lambda *_: None,
    )  # fmt: skip
    monkeypatch.setattr(libraries, "_bundles", lambda _: {"demo": bundle})
    monkeypatch.setattr(libraries, "local_gpu", lambda _: ("SM90", None))
    monkeypatch.setattr(libraries, "run_stage", run_stage)
    monkeypatch.setattr(libraries, "_rows", lambda *_: [])
    assert libraries.tensorrt_rtx(session) == []
    assert found == ([] if kept is None else [kept])
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
