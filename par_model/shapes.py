"""Modules without numbers, for the names and shapes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Module = TypeVar("Module", bound=nn.Module)


class _NoNumbers(TorchFunctionMode):
    """Initial weights are not drawn: on the device "meta" there is nothing to draw them into.

    PyTorch would load its compiler for it, which takes longer than to open a checkpoint.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"] if "tensor" in named else arguments[0]
        return function(*arguments, **named)


def without_weights(kind: Callable[[Any], Module], config: Any) -> Module:
    """A module of ``kind`` on the device "meta": shapes without memory, and without numbers."""
    with torch.device("meta"), _NoNumbers():
        return kind(config)
