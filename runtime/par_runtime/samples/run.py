"""Making the images of a plan into a file, and joining the files of several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.arguments import check_returned, file_name, function, given, whole
from par_runtime.bundle import Bundle
from par_runtime.checked import shown
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.request import several
from par_runtime.samples.file import BLOCK, SampleFile, open_samples
from par_runtime.samples.plan import Plan, classes_of
from par_runtime.samples.reading import checked_part, read_about, read_images
from par_runtime.samples.resize import bicubic

OnImages = Callable[[int, int], None]  #: images that are there, and all of the file
About = dict[str, Any]


def make_samples(
    pipeline: Pipeline,
    plan: Plan,
    out: str | Path,
    *,
    max_batch: int | None = None,
    on_images: OnImages | None = None,
) -> int:
    """Make the images of ``plan`` with ``pipeline``, which runs its bundle, into ``out``; returns how many were made.

    After every batch (at most ``max_batch`` images, by default as for ``Pipeline.generate``) they are in ``out.part``,
    so the same call goes on after a kill; the file then has the same bytes as that of one run. ``on_images`` is called
    before the first batch, and whenever images were added. Raises RequestError, OSError.
    """
    path = file_name("out", out)
    _check("pipeline", pipeline, Pipeline)
    _check("plan", plan, Plan)
    if plan.bundle.hash != pipeline.bundle.hash:
        raise RequestError(
            f"the plan is of {plan.bundle.path}, the pipeline of {pipeline.bundle.path}; give one bundle"
        )
    function("on_images", on_images)
    most, where = pipeline.backend.max_images, f" on {pipeline.backend.info.name}"
    batch = pipeline.default_batch if max_batch is None else whole("max_batch", max_batch, 1, most, where)
    classes, about = plan.all_classes(), plan.about(asdict(pipeline.made_on))
    with open_samples(path, classes, about) as file:
        begun = file.done
        _tell(on_images, file)
        while file.done < len(plan):
            first = plan.start + file.done
            numbers = range(first, min(first + batch, plan.stop))
            result = pipeline.generate(plan.classes(numbers), plan.settings, seeds=plan.seeds(numbers), max_batch=batch)
            assert result.images is not None
            at_once = max(1, BLOCK // file.image_bytes)  # large images of a large batch may be too much at a time
            for i in range(0, len(numbers), at_once):
                _append(file, bicubic(result.images[i : i + at_once], plan.size), on_images)
        file.finish(classes, about)
    return len(plan) - begun


def join_samples(
    parts: Sequence[str | Path], out: str | Path, *, bundle: Bundle | None = None, on_images: OnImages | None = None
) -> About:
    """Write the images of all ``parts`` of one plan into ``out``, in their order; returns what it says of them.

    Every part is read twice: before anything is written, all of them are whole. ``bundle``: the one that made them.
    ``on_images`` as in :func:`make_samples`. Raises RequestError where they are not all parts of one, once, or of
    another bundle, or where one is damaged; OSError.
    """
    path, each_part = file_name("out", out), several("parts", parts)
    if each_part is None or isinstance(parts, os.PathLike):
        raise RequestError(f"parts {given(parts)}: expected a list of the files of all parts")
    paths = [file_name("parts", part) for part in each_part]
    if bundle is not None:
        _check("bundle", bundle, Bundle)
    if not paths:
        raise RequestError("no parts were given; give the file of each")
    function("on_images", on_images)
    abouts = sorted(((read_about(each), each) for each in paths), key=lambda each: each[0]["start"])
    about = joined_about(abouts)
    made_by = about.get("bundle")
    if bundle is not None and (not isinstance(made_by, dict) or made_by.get("hash") != bundle.hash):
        raise RequestError(f"{abouts[0][1]}: was not made by {bundle.path}; give the bundle that made it")
    numbers = range(about["count"])
    classes = np.array(classes_of(about["labels"], about["classes"], about["seed"], numbers), np.int64)
    for each, where in abouts:
        checked_part(where, each, classes[each["start"] : each["stop"]])
    with open_samples(path, classes, about) as file:
        _tell(on_images, file)
        for each, where in abouts:
            _copy(where, each, file, on_images)
        file.finish(classes, about)
    return about


def joined_about(abouts: Sequence[tuple[About, Path]]) -> About:
    """What a file of all parts says. Raises RequestError where one is missing, is there twice, or is of others."""
    first, where = abouts[0]
    reached = 0
    for each, path in abouts:
        for key in dict.fromkeys((*first, *each)):
            if key not in ("start", "stop", "made_on") and each.get(key) != first.get(key):
                difference = f"{key} {shown(each.get(key))}, there {shown(first.get(key))}"
                raise RequestError(f"{path}: is of other images than {where} ({difference}); give the parts of one")
        if each["start"] != reached:
            what = "is there already" if each["start"] < reached else "is missing"
            raise RequestError(
                f"{path}: begins at image {each['start']}, and image {min(reached, each['start'])} {what}; give every "
                "part once"
            )
        reached = each["stop"]
    if reached != first["count"]:
        raise RequestError(
            f"{abouts[-1][1]}: ends before image {reached} of {first['count']}; give the parts behind it too"
        )
    backends: list[Any] = []
    for each, _ in abouts:
        if each.get("made_on") not in backends:
            backends.append(each.get("made_on"))
    on = backends[0] if len(backends) == 1 else {"several": backends}
    return {**first, "start": 0, "stop": first["count"], "made_on": on}


def _copy(path: Path, about: About, file: SampleFile, on_images: OnImages | None) -> None:
    """Append those images of the part at ``path`` that are not there yet."""
    for first, images in read_images(path, about):
        new = max(0, file.done - about["start"] - first)  # those before are there
        if new < len(images):
            _append(file, images[new:], on_images)


def _append(file: SampleFile, images: NDArray[np.uint8], on_images: OnImages | None) -> None:
    try:
        file.append(images)
    finally:  # where the disk is full, some of them may be there
        _tell(on_images, file)


def _tell(on_images: OnImages | None, file: SampleFile) -> None:
    if on_images is not None:
        check_returned("on_images", on_images, on_images(file.done, file.shape[0]))


def _check(name: str, value: object, kind: type) -> None:
    """Raise RequestError unless ``value`` is of this class."""
    if not isinstance(value, kind):
        raise RequestError(f"{name}: expected a {kind.__name__}, not a {type(value).__name__}")
