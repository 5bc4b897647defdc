"""The keys and shapes of a checkpoint against those that an architecture has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from par_model.checkpoint.errors import CheckpointError, some
from par_model.checkpoint.recognise import OURS, Ours, architecture_problem
from par_model.dtypes import PRECISION_DTYPE

#: A buffer of the image tokenizer's training; it may be stored in any dtype.
UNUSED = "quantize.codebook_used"
#: Dtypes that weights may be stored in; fp64 is rounded to the dtype that the caller asks for.
FLOATS = (*PRECISION_DTYPE.values(), torch.float64)


def missing(path: Path, have: Mapping[str, Tensor], key: str, ours: Ours) -> CheckpointError:
    """The error of a file without ``key``, which holds other weights than those of ``ours``: what it holds."""
    expected = OURS[ours].state_dict
    for name, other in OURS.items():
        if name != ours and other.key in have:
            return CheckpointError(f"{path}: no key {key!r}; expected {expected} (this is {other.advice})")
    if (why := architecture_problem(list(have))) is not None:
        return CheckpointError(f"{path}: no key {key!r}; expected {expected}; this {why}")
    return CheckpointError(f"{path}: no key {key!r} among its {len(have)} ({some(have)}); expected {expected}")


def shape_of(path: Path, have: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of ``key``. Raises CheckpointError unless it has ``dimensions`` dimensions, none of them empty."""
    shape = tuple(have[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{path}: {key} has shape {shape}; expected {dimensions} dimensions, none of them empty")
    return shape


def check_keys(path: Path, have: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless ``have`` holds exactly the keys and shapes of ``expected``, in :data:`FLOATS`."""
    absent = [key for key in expected if key not in have]
    extra = [key for key in have if key not in expected]
    if absent or extra:
        parts = [
            f"{len(keys)} {what} ({some(keys)})" for what, keys in (("missing", absent), ("unknown", extra)) if keys
        ]
        raise CheckpointError(
            f"{path}: keys do not fit: {', '.join(parts)}; expected exactly the {len(expected)} keys of the "
            "architecture"
        )
    for key, tensor in expected.items():
        if have[key].shape != tensor.shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(have[key].shape)}; expected {tuple(tensor.shape)}")
        if have[key].dtype not in FLOATS and key != UNUSED:
            raise CheckpointError(
                f"{path}: {key} is stored as {str(have[key].dtype).removeprefix('torch.')}; expected float32, "
                "bfloat16 or float16: quantized weights need scales that no key of the architecture holds"
            )
