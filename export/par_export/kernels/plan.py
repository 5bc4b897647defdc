"""The plan of a whole engine: that of the step and that of the decoder in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from par_export.kernels import plan_decoder, plan_step
from par_export.kernels.contents import Contents
from par_export.kernels.spec import Planned, Refused
from par_export.kernels.step_weights import storages
from par_export.kernels.targets import Target
from par_export.kernels.tile_shapes import AttentionTile, ProductTile
from par_export.kernels.tiles import choose


class Planner(Protocol):
    """Kernels and launches for a bundle, batches of ``images`` and a target, without shapes that are ``refused``."""

    def __call__(
        self, contents: Contents, images: Sequence[int], target: Target, refused: Refused = ...
    ) -> Planned: ...


def plan(
    contents: Contents,
    images: Sequence[int],
    target: Target,
    refused: Refused = frozenset(),
    given: Mapping[str, ProductTile | AttentionTile] = MappingProxyType({}),
    at: int = 1,
) -> Planned:
    """The step and, where the bundle has images, the decoder. ``given``: shapes of tiles that were measured with ``at``
    images.

    Raises BuildError, BundleError, OSError.
    """
    config, vq = contents.config, contents.tokenizer
    tiles = choose(config, images, target, refused, given, storages(contents.step), at)
    phases = [phase.name for phase in contents.bundle.phases]
    planned = plan_step.plan(config, contents.step, contents.read, phases, images, contents.precision, target, tiles)
    if vq is not None:
        planned.merge(
            plan_decoder.plan(vq, config, contents.decoder, images, contents.decoder_precision, target, refused=refused)
        )
    return planned
