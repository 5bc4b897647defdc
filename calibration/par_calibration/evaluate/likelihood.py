"""How likely held-out images are to a bundle, and how much less to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from par_calibration.evaluate.result import Likelihood
from par_calibration.heldout import HeldOut
from par_calibration.report.forced import positions_of
from par_calibration.report.frechet import Double
from par_calibration.report.measures import interval
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.known import raster_array
from par_runtime.pipeline import Pipeline
from par_runtime.progress import OnStep
from par_runtime.request import classes


@dataclass(frozen=True, eq=False)
class Scored:
    """A likelihood, with what another bundle's is compared by: nats [M] of each image, and its codes and class."""

    likelihood: Likelihood
    nats: Double
    raster: Int  #: [M,N] codes in raster order, which do not depend on n
    labels: tuple[int, ...]


def scored(pipeline: Pipeline, name: str, held: HeldOut, seed: int, on_image: OnStep | None = None) -> Scored:
    """The likelihood of ``held`` images: teacher forcing in the calls of generation, unguided. Raises RequestError."""
    bundle = pipeline.bundle
    nats = np.empty(held.tokens.shape)
    size = pipeline.default_batch
    for first in range(0, len(held), size):
        part = slice(first, min(first + size, len(held)))
        nats[part] = -pipeline.score(held.tokens[part], held.labels[part])
        if on_image is not None:
            on_image(part.stop, len(held))
    of_image = nats.mean(1)
    low, high = interval(of_image, seed) if len(held) > 1 else (None, None)
    names = class_names(bundle)
    labels = np.array(held.labels)
    where = positions_of(bundle)
    found = Likelihood(
        bundle=name,
        n=bundle.group_size,
        calls=bundle.calls,
        backend=pipeline.backend.info.name,
        images=len(held),
        images_from=held.source,
        codes=bundle.vocab_size,
        nats=float(of_image.mean()),
        low=low,
        high=high,
        phases={p.name: float(nats[:, where[p.name]].mean()) for p in bundle.phases if p.name in where},
        classes={names[label]: float(of_image[labels == label].mean()) for label in sorted(set(held.labels))},
    )
    return Scored(found, of_image, raster_array(bundle, held.tokens), held.labels)


def class_names(bundle: Bundle) -> list[str]:
    """A name for each class; with its index where another one has the same name (ImageNet has two cranes)."""
    names = [str(each["name"] or each["index"]) for each in classes(bundle)]
    return [name if names.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def beside_the_first(found: Sequence[Scored], seed: int) -> list[Likelihood]:
    """The likelihoods, each with its change from the first one where both are of the same codes and classes.

    Changes are taken image by image, so that their interval is far narrower than that of either.
    """
    if not found:
        return []
    first = found[0]
    out = [first.likelihood]
    for other in found[1:]:
        likelihood = other.likelihood
        if same_images(first, other):
            change = other.nats - first.nats
            low, high = interval(change, seed) if len(change) > 1 else (None, None)
            likelihood = replace(likelihood, change=float(change.mean()), change_low=low, change_high=high)
        out.append(likelihood)
    return out


def same_images(one: Scored, other: Scored) -> bool:
    """Whether both are of the same codes and classes, in the same order."""
    return (
        one.labels == other.labels
        and one.likelihood.codes == other.likelihood.codes
        and np.array_equal(one.raster, other.raster)
    )
