"""The tensors of a bundle's decoder, read one after the other at its first use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from par_runtime.bundle import WEIGHTS
from par_runtime.dtypes import STORAGE, Float, to_float32
from par_runtime.errors import BundleError
from par_runtime.loaded import LoadedFiles


class Tensors:
    """Read tensors by their names in the manifest's table of the decoder's weights."""

    def __init__(self, files: LoadedFiles) -> None:
        self._files, self._table, self.path = files, files.bundle.decoder_weights, files.bundle.path

    def stored(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor as it is stored, in the numpy type of ``dtypes.STORAGE``; and its dtype. Raises BundleError."""
        at = self._table[name]
        numbers = np.empty(at.shape, STORAGE[at.dtype])
        self._files.read(numbers.reshape(-1).view(np.uint8).data, at.offset)
        return numbers, at.dtype

    def numbers(self, name: str) -> Float:
        """A tensor in fp32. Raises BundleError."""
        stored, dtype = self.stored(name)
        numbers = to_float32(stored, dtype)
        if not np.isfinite(numbers).all():
            raise self.not_finite(name)
        return numbers

    def not_finite(self, name: str) -> BundleError:
        """The error about a tensor with a NaN or an infinity: a picture of it would be black, or of noise, without a
        word.
        """
        return BundleError(
            f"{self._files.bundle.path / WEIGHTS}: the decoder's {name} holds numbers that are not finite; copy the "
            "bundle again, or export it again"
        )
