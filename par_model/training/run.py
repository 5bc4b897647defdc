"""What the trainers share: the run folder (log, checkpoints, resuming), EMA, schedule, errors.

A run folder holds ``log.jsonl`` (one line per report), ``checkpoint.pt`` (everything that resuming needs), sheets of
samples and, at the end, ``model.pt`` (the averaged weights and their configuration; this file is exported). A run that
was killed continues with ``--resume`` from its last checkpoint, with the same batches that it would have had without
the kill: the batch of a step depends on the seed and the step alone.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from par_model.checkpoint import open_checkpoint, video_config, vq_config
from par_model.system import naming
from par_model.training.device import copy_saved
from par_model.training.files import (
    InputError,
    alone_in,
    check_run_files,
    regular,
    written_beside,
    written_together,
)
from par_model.training.resume import check_numbers, check_run, read_run, taking_over
from par_model.video import VideoTokenizer
from par_model.vq import VQModel

if TYPE_CHECKING:
    from typing_extensions import Self

Module = TypeVar("Module", bound=nn.Module)


def batch_index(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Rows [batch] of the data for step ``step``: a permutation of the ``count`` rows per epoch, cut into batches."""
    per_epoch = max(count // batch, 1)
    epoch, k = divmod(step, per_epoch)
    return _shuffled(seed, epoch, count)[k * batch : (k + 1) * batch]


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02, share: float = 0.0) -> float:
    """Learning rate of ``step``: linear warm-up to ``peak``, then a cosine down to ``floor * peak``.

    ``share``: of the time of a run that has passed, where it ends after a time; the cosine is as far as that, or as the
    steps are, whichever is further.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    x = max((step - warmup) / max(steps - warmup, 1), share)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(x, 1.0))))


def channels_last(model: Module) -> Module:
    """Store the weights of convolutions in the layout that is fast, on a CPU and in half precision on a GPU; values do
    not change.

    Returns ``model``.
    """
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint for ``torch.load`` beside ``path``, and rename it. Raises OSError."""
    save_together({path: content})


def save_together(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """:func:`save` of several that belong together: all of them are new, or none. Raises OSError."""
    with written_together(*contents) as parts:
        for part, content in zip(parts, contents.values(), strict=True):
            file = io.BytesIO()  # torch.save of a path would hide why a file could not be written
            torch.save(content, file)
            with naming(part):
                part.write_bytes(file.getbuffer())


def write_sheet(path: Path, pixels: np.ndarray) -> None:
    """Write ``pixels`` uint8 [H,W,3] as a PNG beside ``path``, and rename it. Raises OSError."""
    from PIL import Image

    with written_beside(path) as part, naming(part):
        Image.fromarray(pixels).save(part, "PNG")


class EMA:
    """Exponential moving average of the weights, key -> fp32 tensor in ``shadow``; the average is exported."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone().float() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights of ``model`` after ``step``, counted from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))  # a short average at the start
        values = model.state_dict()
        torch._foreach_lerp_(
            [self.shadow[key] for key in values], [value.float() for value in values.values()], 1 - decay
        )

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Go on from the average ``shadow`` of a checkpoint."""
        for key, value in self.shadow.items():
            copy_saved(value, shadow[key])


def load_tokenizer(path: Path) -> VQModel:
    """The tokenizer of a checkpoint of ``parvis train-tokenizer``, with its weights.

    Raises CheckpointError, OSError.
    """
    checkpoint = open_checkpoint(path)
    model = VQModel(vq_config(checkpoint))
    model.load_state_dict(dict(checkpoint.tensors))
    return model


def load_video_tokenizer(path: Path) -> VideoTokenizer:
    """The video tokenizer of a checkpoint, with its weights. Raises CheckpointError, OSError."""
    checkpoint = open_checkpoint(path)
    model = VideoTokenizer(video_config(checkpoint))
    model.load_state_dict(dict(checkpoint.tensors))
    return model


@dataclass
class Run:
    """A run folder, used as a context. ``should_stop`` becomes true on Ctrl-C or SIGTERM; the trainer then writes a
    checkpoint and ends. ``minutes``: after which the run ends, with its earlier processes; None: after its steps.

    Entering it raises InputError where another process trains in this folder, InputError or OSError where one of its
    files could not be written.
    """

    path: Path
    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0  #: that earlier processes of this run took
    should_stop: bool = False

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"--minutes {self.minutes}: expected a number above 0")

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            entered.enter_context(alone_in("--run", self.path))
            check_run_files(self.path)
            for number in (signal.SIGINT, signal.SIGTERM):
                entered.callback(signal.signal, number, signal.signal(number, self._stop))
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def _stop(self, *_: object) -> None:
        self.should_stop = True

    @property
    def seconds(self) -> float:
        """How long this run has taken, with its earlier processes."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Of the run's minutes that have passed: 0 at its start, 1 or more when it is over; 0 without minutes."""
        return 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)

    def done(self, step: int, steps: int) -> bool:
        """Whether the training ends before ``step``: all ``steps`` are made, or the minutes are over (but not at 0)."""
        return step >= steps or (step > 0 and self.share >= 1)

    def log(self, **row: Any) -> None:
        """Append ``row`` and the seconds to ``log.jsonl``, and print them to stderr. Raises OSError."""
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} | {
            "seconds": round(self.seconds, 1)
        }
        file = self.path / "log.jsonl"
        size = regular(file).stat().st_size if file.exists() else 0
        with naming(file):
            try:
                with file.open("a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError:
                with suppress(OSError):  # no half line, which would be the beginning of the next one
                    os.truncate(file, size)
                raise
        print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write ``state`` to another file and rename it, so that a kill leaves the previous file ``name`` whole."""
        save(self.path / name, state | {"seconds": self.seconds})

    @contextmanager
    def resume(self, wanted: bool, config: Mapping[str, Any]) -> Iterator[dict[str, Any] | None]:
        """The last checkpoint, to be taken over inside; None for a new run. ``config``: as checkpoints hold it.

        Raises InputError where a run exists and resuming is not ``wanted``, and where the checkpoint is damaged or of
        another training; nothing is written then.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            yield None
            return
        if not wanted:
            raise InputError(f"{path} exists; give --resume to continue that run, or another --run folder")
        state = read_run(path)
        check_run(path, state, config)
        with taking_over(path):
            check_numbers(path, state)
            self.seconds_before = float(state["seconds"])
            yield state
