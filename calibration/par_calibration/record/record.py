"""Filling a recording: images are made as the runtime makes them, one at a time, and rows of every product are kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from par_calibration.errors import CalibrationError
from par_calibration.record.native_rows import NativeRows
from par_calibration.record.onnx_rows import OnnxRows
from par_calibration.record.recording import Plan, Recording
from par_calibration.record.rows import choose, least_rows
from par_runtime.backends.base import Batch
from par_runtime.backends.native.library import why_not
from par_runtime.bundle import Bundle, matrix_names
from par_runtime.dtypes import Float, Int
from par_runtime.forks import stop_at_the_end
from par_runtime.request import class_indices, image_seeds, image_settings
from par_runtime.schedule import Schedule

IMAGES = 24
SAMPLES = 4096
MOST_IMAGES = 100_000
#: Of bundles whose default is no guidance: rows without class are recorded too, since users may ask for guidance.
GUIDANCE_OF_UNGUIDED = 1.5

OnDone = Callable[[int, int], None]  #: how many are done, and how many there are


class Rows(Protocol):
    """Makes the calls of an image, and gives the rows of their products."""

    name: str  #: what computes, and its version
    rows: dict[str, Float]  #: name of a matrix -> [M,K] of the last call, M = R*q

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """Tokens [B,q] of one call, as ``backends.base.Backend.step``."""
        ...

    def release(self) -> None:
        """Forget all keys: the next call begins an image."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded: ``samples`` rows of each matrix, from ``images`` images."""

    images: int = IMAGES
    samples: int = SAMPLES
    seed: int = 0
    labels: Sequence[int | str] | None = None  #: default: all classes in turn


def plan_of(bundle: Bundle, options: RecordOptions) -> Plan:
    """What ``options`` mean for ``bundle``. Raises RequestError, CalibrationError."""
    for name, value, most in (("images", options.images, MOST_IMAGES), ("samples", options.samples, 2**24)):
        if not 1 <= value <= most:
            raise CalibrationError(f"--{name} {value}: expected a number from 1 to {most}")
    seeds = image_seeds(options.images, options.seed, None)
    if options.labels is None:
        # All classes, in an order of lot: a few images of many classes are then spread over all of them.
        order = np.random.default_rng(options.seed % 2**32).permutation(bundle.n_classes)
        classes = [int(c) for c in order]
    else:
        classes = class_indices(bundle, options.labels)
        if not classes:
            raise CalibrationError("--labels: no labels; give at least one class index or name")
    labels = [classes[i % len(classes)] for i in range(options.images)]
    guidance = bundle.defaults.guidance if bundle.defaults.guidance > 1 else GUIDANCE_OF_UNGUIDED
    plan = Plan(bundle.hash, tuple(labels), tuple(seeds), guidance, -(-options.samples // options.images))
    least = least_rows(Recording(Path(), plan, bundle).positions, 2)
    if plan.rows_per_image < least:
        raise CalibrationError(
            f"--samples {options.samples}: makes {plan.rows_per_image} rows of each of {options.images} images; "
            f"expected at least {least * options.images}: the {least} rows of each image's class and learnable "
            "tokens are always kept; give more samples, or fewer --images"
        )
    whole = 2 * bundle.n_tokens
    return replace(plan, rows_per_image=min(plan.rows_per_image, whole))


def record(recording: Recording, rows: Callable[[], Rows], on_image: OnDone | None = None) -> list[str]:
    """Make what is missing of ``recording``; returns the names of what computed it ([] where nothing was missing).

    ``rows`` is called where something is missing. Raises CalibrationError, BundleError, MemoryError, OSError.
    """
    plan = recording.plan
    missing = [image for image in range(plan.images) if not recording.is_whole(image)]
    if not missing:
        return []
    _check_room(recording, len(missing))
    maker = rows()
    try:
        for done, image in enumerate(missing, plan.images - len(missing)):
            if on_image is not None:
                on_image(done, plan.images)
            _record_image(recording, maker, image)
        if on_image is not None:
            on_image(plan.images, plan.images)
    finally:
        maker.close()
    return [maker.name]


def _record_image(recording: Recording, maker: Rows, image: int) -> None:
    bundle, plan = recording.bundle, recording.plan
    settings = image_settings(bundle, 1, guidance=plan.guidance, guidance_interval=-1)
    schedule = Schedule.of(bundle, [plan.labels[image]], settings, [plan.seeds[image]])
    kept = choose(recording.positions, schedule.batch.rows, plan.rows_per_image, (plan.seeds[image], image))
    out: dict[str, Float] = {
        name: np.empty((len(kept.row), bundle.weights[name].shape[0]), np.float32) for name in matrix_names(bundle)
    }
    tokens = np.zeros((1, bundle.n_tokens), np.int64)
    maker.release()
    for call, batch, ids, write in schedule.walk(tokens):
        stop_at_the_end()
        tokens[:, call.positions] = maker.step(batch, ids, write, schedule.noise[:, call.positions])
        part, place = kept.of_call(call.write, call.query)
        if len(place):
            for name, values in maker.rows.items():
                out[name][part] = values[place]
    finite = next((name for name, values in out.items() if not np.isfinite(values).all()), None)
    if finite is not None:
        raise CalibrationError(
            f"{bundle.path}: what {finite} is multiplied with has numbers that are not finite, in image {image} (class "
            f"{plan.labels[image]}, seed {plan.seeds[image]}); the bundle is broken: 'parvis verify' shows where"
        )
    recording.write(image, kept, out)


def _check_room(recording: Recording, images: int) -> None:
    """Raise CalibrationError where the disk has less room than the images will take."""
    needed = recording.bytes_needed() * images // recording.plan.images
    recording.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(recording.folder).free
    if free < needed:
        raise CalibrationError(
            f"{recording.folder}: a recording of {recording.plan.images} images needs {_size(needed)} more, the disk "
            f"has {_size(free)}; give fewer --samples, or --work on another disk"
        )


def _size(count: int) -> str:
    """``count`` bytes for a message."""
    return f"{count / 1e6:.0f} MB" if count >= 10**7 else f"{count / 1e3:.0f} kB"


def maker_of(bundle: Bundle, threads: int | None = None) -> Rows:
    """The C step, or ONNX Runtime where it cannot run. Raises BundleError, MemoryError, OSError."""
    return OnnxRows(bundle, threads) if why_not(bundle) else NativeRows(bundle, threads)
