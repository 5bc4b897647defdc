"""Where a training computes: the CPU, or a GPU that PyTorch sees; and how data get there.

On a GPU nothing in a step waits for the device: data lie there where they fit, what is copied is copied from pinned
memory, and losses are added up there. What is written is the same from either: tensors of the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from par_model.dtypes import bf16_is_fast
from par_model.training.files import InputError
from par_model.training.raw import shown

EXPECTED = "expected auto, cpu, cuda, or cuda:N with the number of a GPU"
PART_OF_FREE = 4  #: data that take at most this part (a quarter) of a GPU's free memory lie there
#: What optimizers keep of a weight, by the class of PyTorch's that they are.
KEPT = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
LOADED_AT_ONCE = 4096  #: images that are copied to a GPU in one piece


def choose_device(text: str) -> torch.device:
    """The device of ``--device``: "auto" is the first GPU where PyTorch sees one, else the CPU. Raises InputError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise InputError(f"--device {text or 'with an empty text'}: {EXPECTED}")
    count = torch.cuda.device_count() if text != "cpu" and torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and count == 0):
        return torch.device("cpu")
    index = int(text.partition(":")[2] or 0)
    if index >= count:
        if count:
            seen = f"PyTorch sees cuda:0 to cuda:{count - 1} here" if count > 1 else "PyTorch sees only cuda:0 here"
            raise InputError(f"--device {text}: there is no such GPU, {seen}; {EXPECTED}")
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise InputError(
            f"--device {text}: PyTorch sees no GPU here (it {built}); give --device cpu, or install a GPU's driver and "
            "a PyTorch with CUDA"
        )
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    return torch.device("cuda", index)


def autocast(device: torch.device, enabled: bool | None = None) -> torch.autocast:
    """The context in which products and convolutions are computed in bfloat16 on ``device``.

    None enables it where that is fast; else they are computed in fp32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device) if enabled is None else enabled)


@contextmanager
def exact() -> Iterator[None]:
    """A context in which convolutions are computed in fp32, on a GPU too, where PyTorch would round to TF32.

    Rounding moves features over the borders between codes: in bf16 the demo's encoder gives another code at one place
    of six, and a model that is trained on such codes does not know those of the bundle's encoder.
    """
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def moved(values: np.ndarray, device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``. The copy to a GPU waits for nothing that was begun there before."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def on_cpu(state: Any) -> Any:
    """``state`` with every tensor in it on the CPU, so that a file does not depend on the device that made it."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_cpu(value) for value in state)
    return state


def adamw(parameters: Iterable[nn.Parameter], lr: float, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of the tokenizers; on a GPU it updates all weights in one kernel."""
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give ``optimizer`` what a run on either device saved of its weights; its settings stay as they are.

    How an update is computed (``fused``, ``foreach``) belongs to the device, rates to the options. Raises KeyError,
    TypeError, ValueError where an update would fail: PyTorch takes anything for what is kept of a weight.
    """
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    optimizer.load_state_dict(state | {"param_groups": [own | {"params": saved["params"]} for saved, own in pairs]})
    names = next(names for kind, names in KEPT.items() if isinstance(optimizer, kind))
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        if weight in optimizer.state:  # nothing is kept of one that has had no gradient
            for name in names:
                value = optimizer.state[weight][name]
                _check_shape(value, torch.Size() if name == "step" else weight.shape)


def copy_saved(target: Tensor, value: Any) -> None:
    """Copy ``value`` of a checkpoint to ``target``; ``copy_`` would repeat one of another shape in silence. Raises
    TypeError, ValueError.
    """
    _check_shape(value, target.shape)
    target.copy_(value)


def _check_shape(value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{shown(value)} in place of a tensor")
    if value.shape != shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)}, not {tuple(shape)}")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that a training on ``device`` draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(states: dict[str, Tensor] | Tensor, device: torch.device) -> None:
    """Go on from ``states`` of :func:`random_state`, or from that of the CPU alone, as older checkpoints hold it.

    A generator that has no state in it stays as it is.
    """
    states = {"cpu": states} if isinstance(states, Tensor) else states
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class Folder(Protocol):
    """Images or clips: ``raw`` uint8 [count,...] where they are one array, and how a batch of them is made."""

    @property
    def raw(self) -> np.ndarray | None: ...

    def pixels(self, index: np.ndarray) -> Tensor:
        """uint8 [B,...] at ``index`` [B]."""
        ...

    def scaled(self, pixels: Tensor) -> Tensor:
        """What a network takes, float32, of ``pixels``; on their device."""
        ...


class Batches:
    """Batches of ``folder`` on ``device``, where raw pixels lie as a whole if they fit."""

    def __init__(self, folder: Folder, device: torch.device, keep: bool | None = None) -> None:
        """``keep``: whether the pixels lie on the device; None: on a GPU that has the room."""
        self.folder, self.device = folder, device
        raw = folder.raw
        if keep is None and raw is not None and device.type == "cuda":
            keep = raw.nbytes <= torch.cuda.mem_get_info(device)[0] // PART_OF_FREE
        self.kept = _loaded(raw, device) if keep and raw is not None else None

    def batch(self, index: np.ndarray) -> Tensor:
        """The images or clips at ``index`` [B] as float32, as :meth:`Folder.scaled` gives them."""
        if self.kept is not None:
            return self.folder.scaled(self.kept[moved(index, self.device)])
        pixels = self.folder.pixels(index)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return self.folder.scaled(pixels)


def _loaded(raw: np.ndarray, device: torch.device) -> Tensor:
    """``raw`` on ``device``, copied in parts: the array may be a file."""
    kept = torch.empty(raw.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(raw), LOADED_AT_ONCE):
        kept[start : start + LOADED_AT_ONCE] = torch.from_numpy(np.array(raw[start : start + LOADED_AT_ONCE]))
    return kept
