"""Bugs that are planted to see that a comparison notices them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from par_runtime.backends.native import decoding


def one_by_default(bugs: list[Any]) -> list[Any]:
    """For ``parametrize``: the first of ``bugs``, and the others among the slow tests. A tuple is several arguments."""
    rest = (bug if isinstance(bug, tuple) else (bug,) for bug in bugs[1:])
    return [bugs[0], *(pytest.param(*bug, marks=pytest.mark.slow) for bug in rest)]


def decoder_with(folder: Path, line: str, bug: str) -> Path:
    """The decoder in C, compiled into ``folder`` with ``bug`` in the place of ``line``, which its sources must have."""
    sources = Path(decoding.__file__).parent
    found = 0
    for name in ("decoder.c", *(each.name for each in sources.glob("*.h"))):
        text = (sources / name).read_text()
        found += text.count(line)
        (folder / name).write_text(text.replace(line, bug))
    assert found
    library = folder / "decoder.so"
    flags = ("-Og", "-std=gnu11", "-pthread", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, str(folder / "decoder.c"), "-o", str(library), "-lm"], check=True)
    return library
