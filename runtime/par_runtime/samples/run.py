"""Making the images of a plan into a file, and joining the files of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from par_runtime.arguments import whole
from par_runtime.bundle import Bundle
from par_runtime.errors import RequestError
from par_runtime.images.recipe import MadeOn
from par_runtime.pipeline import Pipeline
from par_runtime.samples.file import BLOCK, IMAGES, LABELS, SampleFile, open_array, open_samples, read_about
from par_runtime.samples.plan import Plan
from par_runtime.samples.resize import bicubic

OnImages = Callable[[int, int], None]  #: images that are there, and all of the file


def make_samples(
    pipeline: Pipeline, plan: Plan, out: Path, *, max_batch: int | None = None, on_images: OnImages | None = None
) -> int:
    """Make the images of ``plan`` with ``pipeline``, which runs its bundle, into ``out``; returns how many were made.

    After every batch (at most ``max_batch`` images, by default as for ``Pipeline.generate``) they are in ``out.part``,
    so the same call goes on after a kill; they have the same bytes as in one run. Raises RequestError, OSError.
    """
    if plan.bundle.hash != pipeline.bundle.hash:
        raise RequestError(
            f"the plan is of {plan.bundle.path}, the pipeline of {pipeline.bundle.path}; give one bundle"
        )
    most, where = pipeline.backend.max_images, f" on {pipeline.backend.info.name}"
    batch = pipeline.default_batch if max_batch is None else whole("max_batch", max_batch, 1, most, where)
    classes, about = plan.all_classes(), plan.about(made_on(pipeline))
    with open_samples(out, classes, about) as file:
        begun = done = file.done
        while done < len(plan):
            if on_images is not None:
                on_images(done, len(plan))
            numbers = range(plan.start + done, plan.start + min(done + batch, len(plan)))
            result = pipeline.generate(plan.classes(numbers), plan.settings, seeds=plan.seeds(numbers), max_batch=batch)
            assert result.images is not None
            file.append(bicubic(result.images, plan.size))
            done = file.done
        if on_images is not None:
            on_images(done, len(plan))
        file.finish(classes, about)
    return done - begun


def made_on(pipeline: Pipeline) -> dict[str, Any]:
    """What computes the images, as a file says it: another backend rounds otherwise, so its images are others."""
    info = pipeline.backend.info
    return asdict(MadeOn(info.name, info.decoder or info.name, dict(info.rounding)))


def join_samples(
    parts: Sequence[Path], out: Path, *, bundle: Bundle | None = None, on_images: OnImages | None = None
) -> dict[str, Any]:
    """Write the images of all ``parts`` of one plan into ``out``, in their order; returns what it says of them.

    ``bundle``: the one that made them. Raises RequestError where they are not all parts of one, once, or of another
    bundle; OSError.
    """
    abouts = sorted(((read_about(path), path) for path in parts), key=lambda each: each[0]["start"])
    about = joined_about(abouts)
    made_by = about.get("bundle")
    if bundle is not None and (not isinstance(made_by, dict) or made_by.get("hash") != bundle.hash):
        raise RequestError(f"{abouts[0][1]}: was not made by {bundle.path}; give the bundle that made it")
    shapes = [(each["stop"] - each["start"], *each["shape"]) for each, _ in abouts]
    with ExitStack() as opened:
        labels = []
        for (_, path), shape in zip(abouts, shapes, strict=True):
            with open_array(path, LABELS, "<i8", shape[:1]) as member:
                labels.append(np.frombuffer(member.read(8 * shape[0]), "<i8").astype(np.int64))
        classes = np.concatenate(labels)
        file = opened.enter_context(open_samples(out, classes, about))
        there = file.done  # of an earlier try
        for (each, path), shape in zip(abouts, shapes, strict=True):
            if there < each["stop"]:  # a part that is not whole was not checked
                file.keep(each["start"])
                there = 0
                _copy(path, shape, file, on_images)
        file.finish(classes, about)
    return about


def joined_about(abouts: Sequence[tuple[dict[str, Any], Path]]) -> dict[str, Any]:
    """What a file of all parts says. Raises RequestError where one is missing, is there twice, or is of others."""
    first, where = abouts[0]
    own = ("start", "stop", "made_on")
    reached = 0
    for each, path in abouts:
        for key in each.keys() | first.keys():
            if key not in own and each.get(key) != first.get(key):
                raise RequestError(f"{path}: is of other images than {where} ({key} differs); give the parts of one")
        if each["start"] != reached:
            what = "is there already" if each["start"] < reached else "is missing"
            raise RequestError(
                f"{path}: begins at image {each['start']}, and image {min(reached, each['start'])} {what}; give every "
                "part once"
            )
        reached = each["stop"]
    if reached != first["count"]:
        raise RequestError(f"images {reached} to {first['count'] - 1} are missing; give every part once")
    different = [each["made_on"] for each, _ in abouts if each.get("made_on") != first.get("made_on")]
    on = {"several": [first.get("made_on"), *different]} if different else first.get("made_on")
    return {**first, "start": 0, "stop": first["count"], "made_on": on}


def _copy(path: Path, shape: tuple[int, ...], file: SampleFile, on_images: OnImages | None) -> None:
    """Append the images of the part at ``path``; its checksum is tested before the last ones are written."""
    size = int(np.prod(shape[1:]))
    at_once = max(1, BLOCK // size)
    with open_array(path, IMAGES, "|u1", shape) as member:
        for i in range(0, shape[0], at_once):
            count = min(at_once, shape[0] - i)
            data = member.read(count * size)
            file.append(np.frombuffer(data, np.uint8).reshape(count, *shape[1:]))
            if on_images is not None:
                on_images(file.done, file.shape[0])
