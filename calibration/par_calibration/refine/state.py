"""A training on disk: one file, replaced every minute, from which a stopped training goes on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from par_calibration.errors import CalibrationError
from par_calibration.record.arrays import Form, read_arrays
from par_calibration.refine.latent import Latent
from par_calibration.refine.plan import Plan
from par_runtime.system import check_folder_writable, write_beside

FILE = "refine.npz"
#: What is trained of a matrix, and Adam's moments of each.
TRAINED, MOMENTS = ("numbers", "log_scales"), ("exp_avg", "exp_avg_sq")
NUMBER_BYTES = 12  #: of the file, for each number of a matrix: itself and two moments
#: No training comes near: beyond them the file is damaged, and a scale would not be a number.
MOST_NUMBER, MOST_LOG_SCALE = 1e4, 80.0

Moments = dict[str, Tensor]  #: one of each of MOMENTS


@dataclass
class State:
    """Where a training is: the first ``step`` steps are done."""

    latents: dict[str, Latent]
    moments: dict[str, tuple[Moments, Moments]] | None = None  #: of each matrix, in the order of ``Latent.trained``
    step: int = 0
    losses: list[float] = field(default_factory=list)  #: of each step


def save(state: State, plan: Plan, folder: Path) -> None:
    """Write ``state``, of one step or more, into ``folder``, at once. Raises OSError."""
    assert state.moments is not None
    arrays = {
        "plan": np.frombuffer(plan.text().encode(), np.uint8),
        "step": np.array([state.step], np.int64),
        "losses": np.array(state.losses, np.float64),
    }
    for name, latent in state.latents.items():
        for what, values, moments in zip(TRAINED, latent.trained, state.moments[name], strict=True):
            arrays[f"{name}.{what}"] = values.cpu().numpy()
            arrays |= {f"{name}.{what}.{moment}": moments[moment].cpu().numpy() for moment in MOMENTS}

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_beside(folder / FILE, write)


def load(plan: Plan, folder: Path, start: Mapping[str, tuple[int, ...]], device: torch.device) -> State | None:
    """The state in ``folder``; None where there is none. ``start``: name of each matrix -> its shape.

    Raises CalibrationError where it is of another training, or cannot be read; OSError.
    """
    path = folder / FILE
    if not path.exists():
        return None
    advice = "remove it to begin the training again, or give another --work"
    try:
        found = read_arrays(path, {"plan": ("uint8", (None,))})["plan"].tobytes()
        same = found == plan.text().encode()
        state = _read(path, plan, start, device) if same else None
    except ValueError as error:
        raise CalibrationError(f"{path}: cannot be read as a training; {advice}") from error
    if not same:
        raise CalibrationError(
            f"{path}: is a training of another bundle, or with other --refine, --seed, --weights, --group, --keep, "
            f"--label, --images or --samples; give the same ones, or {advice}"
        )
    return state


def check_room(plan: Plan, folder: Path, start: Mapping[str, tuple[int, ...]], tokens: int) -> None:
    """Raise CalibrationError where the disk lacks room for a training on images of ``tokens`` tokens; OSError."""
    numbers = sum(k * n for k, n in start.values())
    files = 1 if (folder / FILE).exists() else 2  # a new one is written beside the old one
    needed = files * NUMBER_BYTES * numbers + plan.images * tokens * 8
    folder.mkdir(parents=True, exist_ok=True)
    check_folder_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CalibrationError(
            f"{folder}: a training of {numbers / 1e6:.0f} million codes needs {needed / 1e6:.1f} MB there, the disk "
            f"has {free / 1e6:.1f} MB; free some, or give --work on another disk"
        )


def _read(path: Path, plan: Plan, start: Mapping[str, tuple[int, ...]], device: torch.device) -> State:
    """Raises ValueError, OSError."""
    forms: dict[str, Form] = {"step": ("int64", (1,)), "losses": ("float64", (None,))}
    for name, (k, n) in start.items():
        for what, rows in zip(TRAINED, (plan.group, 1), strict=True):
            for key in ("", *(f".{moment}" for moment in MOMENTS)):
                forms[f"{name}.{what}{key}"] = ("float32", (k // plan.group, rows, n))
    arrays = read_arrays(path, forms)
    step, losses = int(arrays["step"][0]), arrays["losses"].tolist()
    if not 1 <= step <= plan.steps or len(losses) != step or not all(map(math.isfinite, losses)):
        raise ValueError("its steps and losses do not fit")
    tensors = {name: torch.from_numpy(values).to(device) for name, values in arrays.items() if name in forms}
    most = {"numbers": MOST_NUMBER, "log_scales": MOST_LOG_SCALE}
    latents, moments = {}, {}
    for name in start:
        trained = [tensors[f"{name}.{what}"] for what in TRAINED]
        own = [{moment: tensors[f"{name}.{what}.{moment}"] for moment in MOMENTS} for what in TRAINED]
        # Comparisons with NaN are false.
        if not all(bool((values.abs() <= most[what]).all()) for what, values in zip(TRAINED, trained, strict=True)):
            raise ValueError(f"{name}: its numbers are none of a training")
        if not all(bool(m[key].isfinite().all()) for m in own for key in MOMENTS) or any(
            bool((m["exp_avg_sq"] < 0).any()) for m in own
        ):
            raise ValueError(f"{name}: its moments are none of a training")
        latents[name], moments[name] = Latent(plan.dtype, trained[0], trained[1]), (own[0], own[1])
    return State(latents, moments, step, losses)
