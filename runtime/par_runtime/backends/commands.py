"""The commands that build engines, for messages: as a shell takes them, so that they can be pasted."""

from __future__ import annotations

import re
from pathlib import Path

from par_runtime.late import importing

_NAME = re.compile(r"([a-z_]+)-[^-]+-sm([0-9]{2,3})-(fp32|fp16|bf16)(-per-phase)?(-.*)?")


def build_command(bundle: Path) -> str:
    """The beginning of the command that builds engines of the bundle at that path."""
    with importing("shlex"):
        import shlex  # here, because only errors need it

    return f"parvis build {shlex.quote(str(bundle))}"


def command_by_name(folder: str, bundle: Path) -> str:
    """The command that builds an engine which cannot be read: what it was is in the name of its ``folder``."""
    named = _NAME.fullmatch(folder)
    if named is None:
        return f"{build_command(bundle)} --target local"
    runtime, capability, precision, mode = named.group(1, 2, 3, 4)
    return command_for(bundle, runtime, f"SM{capability}", precision) + (" --engines per-phase" if mode else "")


def command_for(bundle: Path, runtime: str, target: str, precision: str) -> str:
    """The command that builds an engine of ``runtime``; classic TensorRT builds only for the GPU that it runs on."""
    kind = " --engine kernels" if runtime == "kernels" else ""
    target = "local" if runtime == "tensorrt" else target
    return f"{build_command(bundle)}{kind} --target {target} --precision {precision}"
