"""A training on disk: one file, replaced every minute, from which a stopped training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from par_calibration.errors import CalibrationError
from par_calibration.refine.latent import Latent
from par_calibration.refine.plan import Plan
from par_runtime.system import write_beside

FILE = "refine.pt"


@dataclass
class State:
    """Where a training is: the first ``step`` steps are done."""

    latents: dict[str, Latent]
    optimiser: dict[str, Any] | None = None  #: the state of PyTorch's
    step: int = 0
    losses: list[float] = field(default_factory=list)  #: of each step


def save(state: State, plan: Plan, folder: Path) -> None:
    """Write ``state`` into ``folder``, in one step. Raises OSError."""
    content = {
        "plan": plan.text(),
        "step": state.step,
        "losses": state.losses,
        "latents": {name: latent.trained for name, latent in state.latents.items()},
        "optimiser": state.optimiser,
    }
    write_beside(folder / FILE, lambda part: torch.save(content, part))


def load(plan: Plan, folder: Path, start: Mapping[str, tuple[int, ...]], device: torch.device) -> State | None:
    """The state in ``folder``; None where there is none. ``start``: name of each matrix -> its shape.

    Raises CalibrationError where it is of another training, or cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    advice = "remove it to begin the training again, or give another --work"
    try:
        with path.open("rb") as file:
            content = torch.load(file, map_location=device, weights_only=True)
        same = content["plan"] == plan.text()
        latents = {name: Latent(plan.dtype, *pair) for name, pair in content["latents"].items()}
        state = State(latents, content["optimiser"], int(content["step"]), [float(x) for x in content["losses"]])
        fits = {name: tuple(latent.numbers.flatten(0, 1).shape) for name, latent in latents.items()} == dict(start)
    except Exception as error:  # torch.load raises many kinds for a file that is none, or not whole; OSError too
        raise CalibrationError(f"{path}: cannot be read as a training; {advice}") from error
    if not same:
        raise CalibrationError(
            f"{path}: is a training of another bundle, or with other --refine, --seed, --weights, --group, --keep, "
            f"--images or --samples; give the same ones, or {advice}"
        )
    if not fits:
        raise CalibrationError(f"{path}: holds other matrices than the bundle; {advice}")
    return state
