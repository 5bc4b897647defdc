"""Modules whose weights do not matter: random ones, made where they are needed, or those of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from par_model.checkpoint import check_keys, open_checkpoint
from par_model.transformer import INIT_STD


def with_weights(model: Any, path: str | Path | None, dtype: torch.dtype, device: torch.device) -> Any:
    """``model``, which has no weights, with those of the checkpoint at ``path``, or with random ones, in eval mode."""
    # Uniform numbers with the standard deviation of the initial weights; they are made twice as fast as normal ones.
    bound = 3**0.5 * INIT_STD
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if path is not None:
                pass  # loaded below
            elif parameter.ndim > 1:  # the output head too: with a head of zeros all logits would be equal
                values.uniform_(-bound, bound, generator=generator)
            else:
                values.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # not zeros_like: PyTorch loads its symbolic shapes for that, half a second
                buffer = torch.zeros(buffer.shape, dtype=buffer.dtype)
            setattr(module, name, buffer.to(device))
    if path is not None:
        source = open_checkpoint(path)
        check_keys(source.path, source.tensors, model.state_dict())
        model.load_state_dict({key: source.tensor(key) for key in model.state_dict()})
    return model.eval()
