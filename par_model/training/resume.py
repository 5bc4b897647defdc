"""Going on with a run: its checkpoint is read whole, and is one of a run with the options that are given now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_model.checkpoint import CheckpointError
from par_model.checkpoint.file import read
from par_model.system import naming
from par_model.training.files import InputError, regular
from par_model.training.raw import shown

#: What a checkpoint says it is -> the verb that makes such a run.
VERBS = {"par": "train", "vq": "train-tokenizer", "video-tokenizer": "train-video-tokenizer"}
#: Entries of a configuration by the option that sets them, where it is not called like them.
OPTIONS = {
    "n_layers": "--layers",
    "n_heads": "--heads",
    "vocab_size": "--vocab",
    "codebook_size": "--codes",
    "channel_multipliers": "--multipliers",
    "n_classes": "classes of --codes",
    "grid": "grid of --codes",
    "strides": "--time-strides",
    "sequential_initial": "--parallel-initial",
}
FLAGS = {"--parallel-initial": False, "--causal-groups": True}  #: options without a value -> what each sets
FREE = ("dropout",)  #: what may be another when a run goes on
ANEW = "without a whole copy of it, begin again in another --run folder; nothing was changed"
MOST_STEPS = 10**15  #: of --steps
AGAIN = "give the same options, or another --run folder; nothing was changed"


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run's ``checkpoint.pt``. Raises InputError where it is not whole, OSError; it stays as it is."""
    try:
        with naming(path), regular(path).open("rb") as file:  # torch opens no name that is not UTF-8
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise InputError(f"--resume: {_why(path, error)}; {ANEW}") from error
    if not isinstance(content, dict):
        raise InputError(f"--resume: {path} holds no run of a training; {AGAIN}")
    return content


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch does not read: as the reader of checkpoints says it."""
    try:
        read(path)
    except CheckpointError as clear:
        return str(clear)
    return f"{path}: not readable ({str(error).splitlines()[0][:100]})"


def check_run(path: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise InputError where ``state`` of a run at ``path`` is not one of a training of ``config``."""
    saved = state.get("config")
    if not isinstance(saved, dict) or saved.get("kind") not in VERBS or "live" not in state:
        raise InputError(f"--resume: {path} holds no run of a training; {AGAIN}")
    if saved["kind"] != config["kind"]:
        raise InputError(
            f"--resume: {path} is a run of parvis {VERBS[saved['kind']]}, not of parvis {VERBS[config['kind']]}; give "
            "another --run folder; nothing was changed"
        )
    shared = config.keys() & saved.keys() - {"kind", *FREE}
    pairs = {OPTIONS.get(k, f"--{k.replace('_', '-')}"): (saved[k], config[k]) for k in config if k in shared}
    other = {name: both for name, both in pairs.items() if _plain(both[0]) != _plain(both[1])}
    if other:
        was, now = (", ".join(_shown(name, both[i]) for name, both in other.items()) for i in (0, 1))
        raise InputError(f"--resume: the run in {path.parent} was trained with {was}; given now: {now}; {AGAIN}")


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _shown(name: str, value: Any) -> str:
    """An option and its ``value`` as they are given on the command line."""
    if name in FLAGS:
        return name if value == FLAGS[name] else f"no {name}"
    if name == "--time-strides" and isinstance(value, (list, tuple)):
        value = [stride[0] for stride in value]
    if name == "grid of --codes" and isinstance(value, (list, tuple)):
        return f"{name} {'x'.join(map(str, value))}"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def check_numbers(path: Path, state: Mapping[str, Any]) -> None:
    """Raise InputError where ``state`` of the run at ``path`` holds numbers that no training writes: a step that is no
    count, or tensors that are not finite. Raises KeyError where it has none.
    """
    step, seconds = state["step"], state["seconds"]
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise InputError(f"--resume: {path}: its step is {shown(step)}; expected 0 to {MOST_STEPS}: {ANEW}")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise InputError(f"--resume: {path}: its seconds are {shown(seconds)}; expected a number of 0 or more: {ANEW}")
    for name, value in _leaves("", state):
        finite = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
        if not finite:
            raise InputError(f"--resume: {path}: {name} holds a number that is not finite (NaN or infinite); {ANEW}")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | float]]:
    """The tensors and floats in ``value``, with where they are."""
    if isinstance(value, (Tensor, float)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), each)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from _leaves(f"{name}[{i}]", each)


@contextmanager
def taking_over(path: Path) -> Iterator[None]:
    """Raise InputError where what is done inside finds that the checkpoint at ``path`` is not one of this training."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise
        first = next(iter(str(error).splitlines()), "")[:120]
        raise InputError(
            f"--resume: {path} does not fit this training ({type(error).__name__}: {first}); {AGAIN}"
        ) from error
