"""What both trainers share: the data folder, the run folder (log, checkpoints, resume), EMA, schedule.

A run folder holds ``log.jsonl`` (one line per report), ``checkpoint.pt`` (all that resuming needs), sample
sheets and, at the end, ``model.pt`` (the averaged weights and their config, which is what is exported). A killed run continues with ``--resume`` from the last checkpoint, with the same batches
that it would have seen: the batch of a step depends on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Module = TypeVar("Module", bound=nn.Module)


class InputError(Exception):
    """Something given to a trainer that it cannot use; the message says what is expected and how to fix it."""


@dataclass(frozen=True)
class ImageFolder:
    """Raw images: ``images.u8`` uint8 [count, size, size, 3], ``labels.u8`` uint8 [count], ``meta.json``."""

    images: np.ndarray  #: [count, size, size, 3] uint8, memory-mapped
    labels: np.ndarray  #: [count] uint8
    class_names: list[str]

    @staticmethod
    def open(path: Path) -> ImageFolder:
        """Map the folder that ``models/recipe/render.mjs`` writes."""
        meta_path = path / "meta.json"
        if not meta_path.is_file():
            raise InputError(f"{path} holds no meta.json; expected the folder that models/recipe/render.mjs writes")
        meta = json.loads(meta_path.read_text())
        shape = (meta["count"], meta["size"], meta["size"], 3)
        images = np.memmap(path / "images.u8", dtype=np.uint8, mode="r", shape=shape)
        labels = np.fromfile(path / "labels.u8", dtype=np.uint8)
        if len(labels) != len(images):
            raise InputError(f"{path} has {len(images)} images and {len(labels)} labels; render it again")
        return ImageFolder(images, labels, list(meta["styles"]))

    def batch(self, index: np.ndarray) -> Tensor:
        """Images [B,3,H,W] float32 in [-1,1], with ``index`` [B]."""
        x = torch.from_numpy(np.ascontiguousarray(self.images[index]))
        return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def batch_index(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Rows of step ``step``: a permutation of the data per epoch, cut into batches."""
    per_epoch = max(count // batch, 1)
    epoch, k = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[k * batch : (k + 1) * batch]


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Learning rate: linear warm-up to ``peak``, then a cosine down to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(x, 1.0))))


def channels_last(model: Module) -> Module:
    """Lay the convolutions' weights out as CPU convolutions want them; numbers do not change. Returns ``model``."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class EMA:
    """Exponential moving average of the weights; the average is what is exported."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))  # short memory at the start
        for key, value in model.state_dict().items():
            self.shadow[key].lerp_(value.float(), 1 - decay)


def command(work: Callable[[], None]) -> int:
    """Run a trainer's ``work``: 0, or 2 with one line on stderr for what the user can mend."""
    try:
        work()
    except (InputError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"parvis: error: {text}", file=sys.stderr)
        return 2
    return 0


@dataclass
class Run:
    """A run folder, used as a context. ``should_stop`` turns true on Ctrl-C or SIGTERM: the trainer then checkpoints
    and ends."""

    path: Path
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0  #: of earlier processes of this run
    should_stop: bool = False

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._before = {sig: signal.signal(sig, self._stop) for sig in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def _stop(self, *_: object) -> None:
        self.should_stop = True

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def log(self, **row: Any) -> None:
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} | {
            "seconds": round(self.seconds, 1)
        }
        with (self.path / "log.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write ``state`` beside and rename, so that a kill leaves the previous file."""
        part = self.path / f".{name}.part"
        torch.save(state | {"seconds": self.seconds}, part)
        os.replace(part, self.path / name)

    def resume(self, wanted: bool) -> dict[str, Any] | None:
        """The last checkpoint, or None for a fresh run; refuses to overwrite a run silently."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        if not wanted:
            raise InputError(f"{path} exists; give --resume to continue that run, or another --run folder")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.seconds_before = float(state["seconds"])
        return state
