"""Whole images of a bundle on the GPU: the tokens of the CPU, whichever way they are launched, in memory that stays.

What they are compared with: the tokens that the export made on a CPU, which the manifest keeps (the self-test); the
same network in PyTorch on the CPU in fp32 (``reference.py``), through ``verify``, with the floors that it has; and the
engine itself, launched in other ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from par_export.card.lines import Emit
from par_runtime import verify
from par_runtime.backends.engines import CAPTURES
from par_runtime.errors import BundleError
from par_runtime.pipeline import Pipeline
from par_runtime.request import Settings

LEAK_BYTES = 16 * 10**6  #: by which free memory may change: the driver's own
STRESS_BATCH = 4
#: Settings that go through every part of the sampling tail.
SETTINGS = (
    Settings(guidance=2.0),
    Settings(guidance=1.0, top_k=20),
    Settings(guidance=3.0, top_p=0.9, temperature=0.8),
    Settings(guidance=1.5, greedy=True),
)


def check_images(spec: Mapping[str, Any], emit: Emit) -> None:
    """All checks of the bundle ``path`` on ``device``; ``name`` begins their names.

    ``groups``: how many calls of the last phase ``verify`` compares (None: all); ``seed``: of all images.
    """
    path, name, seed = Path(spec["path"]), spec["name"], spec["seed"]

    def check(what: str, passed: bool, text: str, **error: float) -> None:
        emit("check", name=f"{name}: {what}", passed=bool(passed), text=text, **error)

    def begin(what: str) -> None:
        emit("begin", name=f"{name}: {what}")

    begin("loads")
    pipelines = {}
    for capture in CAPTURES:
        pipelines[capture] = Pipeline.load(path, spec["device"], capture=capture, selftest=False)
    first = pipelines["image"]
    check("loads", True, first.backend.info.name)
    bundle = first.bundle
    check_selftest(first, spec, emit)
    most = min(first.backend.max_images, 3)
    made = {}
    for capture, pipeline in pipelines.items():
        begin(f"launched by {capture}")
        for count in (1, most):
            labels = [(seed + i) % bundle.n_classes for i in range(count)]
            made[capture, count] = pipeline.generate(labels, seed=seed, guidance=1.5)
        used = getattr(pipeline.backend, "capturing", "")
        same = all(_same(made[capture, count], made["image", count]) for count in (1, most))
        text = "the same images" if same else "other images than launched as a whole"
        if used != capture:
            text = f"the driver refused it, and {used} is in use; {text}"
        check(f"launched by {capture}", same and used == capture, text)
    begin("alone as in a batch")
    alone, beside = made["image", 1], made["image", most]
    same = bool((alone.tokens[0] == beside.tokens[0]).all())
    check("alone as in a batch", same, f"{_equal(alone.tokens[0], beside.tokens[0])} tokens equal")
    check_repeat(first, alone, spec, emit)
    begin("call by call")
    with_previews = first.generate(
        [seed % bundle.n_classes], seed=seed, guidance=1.5, preview_every=bundle.calls, on_preview=lambda *_: None
    )
    check("call by call", _same(with_previews, alone), f"{_equal(with_previews.tokens, alone.tokens)} tokens equal")
    verified(first, spec, emit)
    for pipeline in pipelines.values():
        pipeline.close()


def check_selftest(pipeline: Pipeline, spec: Mapping[str, Any], emit: Emit) -> None:
    """The bundle's self-test, if it has one."""
    name = f"{spec['name']}: self-test"
    emit("begin", name=name)
    if not pipeline.bundle.selftest["labels"]:
        return
    passed, text = True, "the tokens of the export, up to near-ties"
    try:
        pipeline.selftest()
    except BundleError as error:
        passed, text = False, str(error)
    emit("check", name=name, passed=passed, text=text)


def one_image(pipeline: Pipeline, spec: Mapping[str, Any]) -> Any:
    """The result of one image that depends on ``seed`` alone."""
    return pipeline.generate([spec["seed"] % pipeline.bundle.n_classes], seed=spec["seed"], guidance=1.5)


def check_repeat(pipeline: Pipeline, first: Any, spec: Mapping[str, Any], emit: Emit) -> None:
    """:func:`one_image` is ``first``, which it gave before."""
    name = f"{spec['name']}: the same again"
    emit("begin", name=name)
    again = one_image(pipeline, spec)
    text = f"{_equal(again.tokens, first.tokens)} tokens equal"
    emit("check", name=name, passed=_same(again, first), text=text)


def verified(pipeline: Pipeline, spec: Mapping[str, Any], emit: Emit) -> None:
    """``pipeline`` against PyTorch on ``reference``, by ``verify`` and its floors: a check each. ``spec`` as for
    :func:`check_images`.
    """
    from par_export.card.reference import reference  # here: PyTorch takes seconds to import, and only this needs it

    bundle, name, seed = pipeline.bundle, spec["name"], spec["seed"]
    emit("begin", name=f"{name}: verify")
    against = reference(bundle, spec["reference"])
    images = min(pipeline.backend.max_images, len(SETTINGS))
    trial = verify.Trial(
        [(seed + i) % bundle.n_classes for i in range(len(SETTINGS))],
        list(SETTINGS),
        [seed + i for i in range(len(SETTINGS))],
        images,
    )
    report = verify.run(pipeline, against, trial, spec["groups"])
    for each in report.checks:
        # Of numbers that may be at most their floor, the table shows how near they come to it.
        at_most = "allowed up to" in each.text and each.floor > 0
        error = {"error": each.value, "allowed": each.floor} if at_most else {}
        emit("check", name=f"{name}: {each.name}", passed=bool(each.passed), text=each.text, **error)
    against.close()


def _same(a: Any, b: Any) -> bool:
    """Whether two results have the same tokens and images."""
    images = (a.images is None) == (b.images is None) and (a.images is None or np.array_equal(a.images, b.images))
    return bool(images and np.array_equal(a.tokens, b.tokens))


def _equal(a: np.ndarray, b: np.ndarray) -> str:
    return f"{int((a == b).sum())} of {a.size}"


def check_memory(spec: Mapping[str, Any], emit: Emit) -> None:
    """Memory of the device before and after ``images`` images of the bundle ``path``, in batches of several sizes."""
    pipeline = Pipeline.load(Path(spec["path"]), spec["device"], selftest=False)
    backend: Any = pipeline.backend
    largest = min(STRESS_BATCH, backend.max_images)
    emit("begin", name=f"{spec['name']}: memory")
    # Every batch size has memory of its own, and graphs. A larger one has those of all smaller ones freed, to be made
    # anew at their next use. So the largest comes first; otherwise that would be counted.
    for count in range(largest, 0, -1):
        pipeline.generate([0] * count, seed=0)
    backend.device.activate()
    before, done, turn = backend.device.free_bytes(), 0, 0
    while done < spec["images"]:
        count = 1 + turn % largest
        pipeline.generate([turn % pipeline.bundle.n_classes] * count, seed=turn)
        done, turn = done + count, turn + 1
    backend.device.activate()
    after = backend.device.free_bytes()
    emit(
        "check",
        name=f"{spec['name']}: memory",
        passed=bool(before - after < LEAK_BYTES),
        text=f"{done} images: {before / 1e6:.0f} MB free before, {after / 1e6:.0f} MB after",
    )
    pipeline.close()


def make_one(spec: Mapping[str, Any]) -> None:
    """One image of the bundle ``path``, kernel by kernel, with nothing that takes long."""
    pipeline = Pipeline.load(Path(spec["path"]), spec["device"], capture="none", selftest=False)
    pipeline.generate([0], seed=1, guidance=1.5)
    pipeline.close()
