"""What of a bundle an engine of kernels is planned from: sizes, where its weights lie, and the few that are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from par_export.engines.contents import decoder_weights, step_config, step_weights, tokenizer_config
from par_export.engines.weights import NUMPY_DTYPE, check_range
from par_export.graphs.vq import PREFIX
from par_model.config import PARConfig, VQConfig
from par_runtime.bundle import WEIGHTS, Bundle, Stored
from par_runtime.checked import open_regular
from par_runtime.dtypes import DTYPE
from par_runtime.quantised import MOST_CODE, SCALE

_STAY_FP32 = ("cos", "sin")  #: tables that are read as they are


@dataclass(frozen=True)
class Contents:
    """A bundle, the precisions of its step and decoder, and what is read of it once for all targets.

    Its attributes raise BundleError where the bundle's graphs and manifest disagree, OSError.
    """

    bundle: Bundle
    precision: str
    decoder_precision: str

    @cached_property
    def config(self) -> PARConfig:
        """The configuration of the step network and of the order of its tokens."""
        return step_config(self.bundle)

    @cached_property
    def step(self) -> Mapping[str, Stored]:
        """name -> where a tensor of the step network lies in the weights file. A matrix is (in, out)."""
        entries = step_weights(self.bundle).entries
        return {name: stored for name, stored in entries.items() if not name.startswith(PREFIX)}

    @cached_property
    def tokenizer(self) -> VQConfig | None:
        """The configuration of the image tokenizer; None where the bundle ends at tokens, and of clips: no kernels
        decode them.
        """
        config = None if self.bundle.image_size is None else tokenizer_config(self.bundle)
        return config if isinstance(config, VQConfig) else None

    @cached_property
    def decoder(self) -> Mapping[str, Stored]:
        """name without "vq." -> where a tensor of the decoder lies; empty where kernels decode nothing."""
        if self.tokenizer is None:
            return {}
        entries = decoder_weights(self.bundle, self.tokenizer).entries
        return {name.removeprefix(PREFIX): stored for name, stored in entries.items() if name.startswith(PREFIX)}

    def read(self, stored: Stored) -> NDArray[np.float32]:
        """A tensor of the weights file, in fp32. For small ones."""
        with open_regular(self.bundle.path / WEIGHTS) as file:
            file.seek(stored.offset)
            raw = np.frombuffer(file.read(stored.length), NUMPY_DTYPE[stored.dtype])
        return raw.reshape(stored.shape).astype(np.float32)

    def check_range(self) -> None:
        """Raise BuildError where a weight does not fit the precision that it will be converted to. Done once."""
        _ = self._in_range

    @cached_property
    def _in_range(self) -> bool:
        file = self.bundle.path / WEIGHTS
        # Gains are scaled to fit; codes fit, and their scales are read as fp32.
        fit = {name for name, stored in self.step.items() if len(stored.shape) == 1 or stored.dtype in MOST_CODE}
        fit |= {name for name in self.step if name.endswith(SCALE)} | {*_STAY_FP32}
        step = {name: stored for name, stored in self.step.items() if name not in fit}
        check_range(file, step, DTYPE[self.precision], "--precision bf16")
        check_range(file, self.decoder, DTYPE[self.decoder_precision], "--decoder-precision fp32")
        return True
