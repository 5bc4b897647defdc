"""The plan of a whole engine: that of the step and that of the decoder in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from par_export.errors import BuildError
from par_export.kernels.contents import Contents
from par_export.kernels.spec import Planned
from par_export.kernels.targets import Target


class Planner(Protocol):
    """Kernels and launches for a bundle, batches of ``images`` and a target."""

    def __call__(self, contents: Contents, images: Sequence[int], target: Target) -> Planned: ...


def plan(contents: Contents, images: Sequence[int], target: Target) -> Planned:
    """The step and, where the bundle has images, the decoder. Raises BuildError, BundleError, OSError."""
    raise BuildError("the plans of step and decoder are not part of this version")
