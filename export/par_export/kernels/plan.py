"""The plan of a whole engine: that of the step and that of the decoder in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from par_export.kernels import plan_decoder, plan_step
from par_export.kernels.contents import Contents
from par_export.kernels.spec import Planned
from par_export.kernels.targets import Target
from par_export.kernels.tiles import choose


class Planner(Protocol):
    """Kernels and launches for a bundle, batches of ``images`` and a target."""

    def __call__(self, contents: Contents, images: Sequence[int], target: Target) -> Planned: ...


def plan(contents: Contents, images: Sequence[int], target: Target) -> Planned:
    """The step and, where the bundle has images, the decoder. Raises BuildError, BundleError, OSError."""
    config = contents.config
    planned = plan_step.plan(
        config,
        contents.step,
        contents.read,
        [phase.name for phase in contents.bundle.phases],
        images,
        contents.precision,
        target,
        choose(config, images, target),
    )
    if contents.tokenizer is not None:
        planned.merge(
            plan_decoder.plan(contents.tokenizer, config, contents.decoder, images, contents.decoder_precision, target)
        )
    return planned
