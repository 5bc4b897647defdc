"""Servers that the suite ``http`` starts: their processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from par_runtime.bench.subjects.served import ServerProcess


def started_servers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of all servers that are started from now on."""
    real, found = ServerProcess.__init__, list[int]()

    def start(self: ServerProcess, *given: Any) -> None:
        real(self, *given)
        found.append(self.pid)

    monkeypatch.setattr(ServerProcess, "__init__", start)
    return found


def ended(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
