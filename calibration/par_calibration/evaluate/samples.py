"""Files of ``parvis sample``, compared with held-out images like sets that are made now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from par_calibration.evaluate.distances import LEAST
from par_calibration.evaluate.images import Labels
from par_calibration.pictures import Pixels
from par_runtime.backends.base import image_shape
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.request import Settings, image_settings
from par_runtime.samples import open_images
from par_runtime.samples.plan import classes_of
from par_runtime.samples.reading import read_about, read_images


def about_samples(path: Path, bundle: Bundle, wanted: frozenset[int]) -> dict[str, Any]:
    """What samples say about themselves, checked against ``bundle`` and the classes that are ``wanted`` (none: all).

    Raises RequestError, OSError.
    """
    about = read_about(path)
    open_images(path)
    if bundle.image_size is not None and about["shape"] != list(image_shape(bundle)):
        raise RequestError(
            f"--samples {path}: images of shape {about['shape']}; {bundle.path} makes {list(image_shape(bundle))}: "
            "give files that were made without --size"
        )
    if about["classes"] != bundle.n_classes:
        raise RequestError(
            f"--samples {path}: of a bundle of {about['classes']} classes; {bundle.path} has {bundle.n_classes}: give "
            "files of bundles like it"
        )
    chosen = chosen_samples(about, wanted)
    if wanted and not chosen:
        raise RequestError(f"--samples {path}: holds no images of these classes; give others with --label")
    if chosen < LEAST:
        raise RequestError(f"--samples {path}: holds {chosen} images; expected {LEAST} or more, which a distance takes")
    return about


def chosen_samples(about: dict[str, Any], wanted: frozenset[int]) -> int:
    """How many samples are of the classes that are ``wanted`` (none: all)."""
    labels = sample_classes(about)
    return int(np.isin(labels, list(wanted)).sum()) if wanted else len(labels)


def sample_classes(about: dict[str, Any]) -> Labels:
    """The classes [M] of samples, by what they say about themselves."""
    numbers = range(about["start"], about["stop"])
    return np.array(classes_of(about["labels"], about["classes"], about["seed"], numbers), np.int64)


def of_samples(path: Path, about: dict[str, Any]) -> Iterator[tuple[Pixels, Labels]]:
    """The images of a file of ``parvis sample``, read and not mapped, so that one that is cut off is an error and no
    signal. Raises RequestError, OSError.
    """
    if read_about(path) != about:
        raise RequestError(
            f"--samples {path}: is another file than before; leave it alone until the end, and run again"
        )
    labels = sample_classes(about)
    for first, images in read_images(path, about):
        yield images, labels[first : first + len(images)]


def settings_of(about: dict[str, Any], bundle: Bundle) -> Settings | None:
    """The settings of samples, as far as they are ones; ``bundle``: any."""
    known = about.get("settings")
    try:
        return image_settings(bundle, 1, Settings(**known))[0] if isinstance(known, dict) else None
    except (TypeError, RequestError):
        return None
