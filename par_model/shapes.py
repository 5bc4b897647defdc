"""Modules without numbers, for the names and shapes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoNumbers(TorchFunctionMode):
    """Initial weights are not drawn: on the device "meta" there is nothing to draw them into.

    PyTorch would load its compiler for it, which takes 2 seconds.
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


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules that are made here lie on the device "meta": they have shapes, and neither memory nor numbers."""
    with torch.device("meta"), _NoNumbers():
        yield
