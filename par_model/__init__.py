"""PAR in PyTorch: the model, its tokenizer and its reference generation. See ``docs/design.md``.

>>> from par_model import PAR, PARConfig, VQModel, VQConfig, generate

Names are imported when they are first used, because ``par_export`` builds engines with the configurations alone, on
machines without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["PAR", "PARConfig", "VQConfig", "VQModel", "generate"]

if TYPE_CHECKING:
    from par_model.config import PARConfig, VQConfig
    from par_model.generation import generate
    from par_model.transformer import PAR
    from par_model.vq import VQModel

#: name -> the module that has it. No module may have the name of one of them: importing it would hide the name.
_MODULES = {
    "PAR": "par_model.transformer",
    "PARConfig": "par_model.config",
    "VQConfig": "par_model.config",
    "VQModel": "par_model.vq",
    "generate": "par_model.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
