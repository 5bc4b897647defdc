"""The decoder's weights: where each lies in the bundle, and how it is packed for the kernels that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from par_export.kernels.decoder_tiles import NUMBER_BYTES
from par_export.kernels.spec import STORED_KINDS, Constant, Planned, Spec, power
from par_runtime.backends.program import Launch, Pointer, Weight
from par_runtime.bundle import Stored
from par_runtime.dtypes import DTYPE
from par_runtime.errors import BundleError

_PACKED = 4096  #: numbers that a block packs at most


class DecoderWeights:
    """Plans the weights that are asked for, each once. ``stored`` None: none of them, only the work is counted."""

    def __init__(self, stored: Mapping[str, Stored] | None, precision: str, planned: Planned) -> None:
        self.stored, self.precision, self.planned = stored, precision, planned

    def filter(self, key: str, c: int, width: int, kernel: int, step: int, up: bool = False) -> Pointer:
        """The weights [width,c,kernel,kernel] of a convolution, packed."""
        name = f"decoder.{key}"
        side, places = (2, 4) if up else (kernel, 1)
        numbers = width * side * side * -(-c // step) * step
        tensor = self._tensor(f"{key}.weight", (width, c, kernel, kernel))
        if tensor is not None and name not in self.planned.weights:
            block = _PACKED // places  # that of upsampling reads nine numbers for each
            constants = {"C": c, "O": width, "SIDE": side, "BK": step, "UP": up, "BLOCK": block}
            grid = (-(-numbers // block), places, 1)
            launch = self._pack("pack_conv", constants, tensor, f"*{self.precision}", grid)
            self.planned.weights[name] = Weight(places * numbers * NUMBER_BYTES[self.precision], tensor, 0, launch)
        return Pointer(name)

    def vector(self, key: str, shape: tuple[int, ...], precision: str = "fp32") -> Pointer:
        """Numbers in the order in which they are stored."""
        name = f"decoder.{key}"
        tensor = self._tensor(key, shape)
        if tensor is not None and name not in self.planned.weights:
            count, launch = math.prod(shape), None
            if tensor.dtype != DTYPE[precision]:
                block = min(power(count), _PACKED)
                constants = {"COUNT": count, "BLOCK": block}
                launch = self._pack("pack_vector", constants, tensor, f"*{precision}", (-(-count // block), 1, 1))
            self.planned.weights[name] = Weight(count * NUMBER_BYTES[precision], tensor, 0, launch)
        return Pointer(name)

    def _pack(
        self, function: str, constants: Mapping[str, Constant], tensor: Stored, kind: str, grid: tuple[int, int, int]
    ) -> Launch:
        parameters = (("raw", STORED_KINDS[tensor.dtype]), ("packed", kind))
        spec = Spec(f"decoder_pack.{function}", tuple(constants.items()), parameters, 4, 1)
        return self.planned.launch(spec, grid, {"raw": Pointer("raw"), "packed": Pointer("packed")})

    def _tensor(self, key: str, shape: tuple[int, ...]) -> Stored | None:
        """Where the tensor ``key`` lies. Raises BundleError where there is none of ``shape``."""
        if self.stored is None:
            return None
        tensor = self.stored.get(key)
        if tensor is None or tensor.shape != shape or tensor.dtype not in STORED_KINDS:
            given = "missing" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
            raise BundleError(
                f"tokenizer weights: {key} is {given}; expected shape {shape} in {', '.join(STORED_KINDS)}; "
                "export the bundle again"
            )
        return tensor
