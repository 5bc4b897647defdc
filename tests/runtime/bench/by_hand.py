"""What tests of the bench's command share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from par_runtime.bench import bounds
from par_runtime.bench.limits import Round


def limits_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure; ``test_limits.py`` measures them."""
    monkeypatch.setattr(
        bounds, "measure_cpu", lambda *_: Round({2**22: {"by hand": 50.0}, 2**30: {"by hand": 20.0}}, {"by hand": 0.1})
    )
    monkeypatch.setattr(bounds, "MORE_ROUNDS", 0)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
