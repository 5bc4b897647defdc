"""A bundle on PyTorch as a backend: the reference that ``verify`` compares an engine with where nothing else is there.

It computes in fp32 with the weights as they are stored, on the CPU or on a GPU, as the oracle of the parity gate does.
Tokens are drawn from its logits by the runtime's own numpy (``backends/draws.py``).

Letters: R rows, B images, q positions of one call, N tokens, V codes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from par_export.restored import read_weights, restored_decoder, restored_model
from par_model.transformer import KVCache
from par_runtime.backends.base import BackendInfo, Batch, check_positions
from par_runtime.backends.draws import draw_all
from par_runtime.bundle import Bundle
from par_runtime.dtypes import LOGIT_ROUNDING, Float, Int
from par_runtime.errors import RequestError
from par_runtime.pipeline import Pipeline


class TorchBackend:
    """See ``Backend``. All rows of a call stand at the same position, and row r lies in cache row r.

    Raises BundleError, ManifestError, CheckpointError, OSError.
    """

    max_images = 64

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        self._bundle, self._device = bundle, torch.device(device)
        stored = read_weights(bundle)
        self._model = restored_model(bundle, stored, torch.float32, self._device)
        self._decoder = restored_decoder(bundle, stored, torch.float32, self._device)
        self._embed = stored["embed"].to(self._device, torch.float32)
        self._caches: list[KVCache] = []
        order = np.array(bundle.order)
        self._place = np.empty_like(order)
        self._place[order] = np.arange(len(order))
        self.tie = LOGIT_ROUNDING["fp32"]
        self.info = BackendInfo("torch", torch.__version__, device, "fp32", 4.0, 4.0)

    def step(self, batch: Batch, ids: Int, write: Int, uniform: Float) -> Int:
        """``Backend.step``."""
        logits = self.logits(batch, ids, write)
        query = logits.shape[1]
        drawn: Int = draw_all(
            logits.reshape(-1, logits.shape[-1]),
            uniform.reshape(-1),
            batch.temperature.repeat(query),
            batch.top_k.repeat(query),
            batch.top_p.repeat(query),
        )
        return drawn.reshape(-1, query)

    @torch.no_grad()
    def logits(self, batch: Batch, ids: Int, write: Int) -> Float:
        """``Backend.logits``: it writes the keys of the call too, as a step does."""
        rows, query = ids.shape
        check_positions(write, query, self._bundle.n_tokens)
        if np.ptp(write) or (batch.cache_row != np.arange(rows)).any():
            raise RequestError("rows at several positions, or cache rows of their own; the reference takes neither")
        if not self._caches or len(self._caches[0].k) < rows:
            config = self._model.config
            self._caches = [KVCache(rows, config, torch.float32, self._device) for _ in range(config.n_layers)]
        first = int(write[0])
        positions = torch.arange(first, first + query, device=self._device)
        mask = torch.ones(query, first + query, dtype=torch.bool, device=self._device)
        caches = [_Rows(cache, rows) for cache in self._caches]
        x = self._embed[torch.from_numpy(np.ascontiguousarray(ids)).to(self._device)]
        logits = self._model.head(self._model.blocks(x, positions, mask, caches))  # type: ignore[arg-type]
        cond, uncond = logits[: batch.images], logits[torch.from_numpy(batch.uncond_row).to(self._device)]
        guidance = torch.from_numpy(batch.guidance).to(self._device)[:, None, None]
        guided: Float = (uncond + (cond - uncond) * guidance).cpu().numpy()
        return guided

    def release(self, cache_rows: Int | None = None) -> None:
        """``Backend.release``: a call names what it sees, so nothing is to be done."""

    @torch.no_grad()
    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        """``Backend.decode``. Raises RequestError where the bundle ends at tokens."""
        if self._decoder is None:
            raise RequestError(f"{self._bundle.path}: the bundle ends at tokens")
        model, codes = self._decoder
        _, height, width = self._bundle.grid
        raster = torch.from_numpy(tokens[:, self._place].reshape(-1, height, width)).to(self._device)
        images = []
        for one in raster:  # one by one: 384 pixels take half a gigabyte of activations each
            pixels = model.decode_codes(codes[one][None].permute(0, 3, 1, 2))
            images.append((127.5 * pixels + 128).floor().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8))
        decoded: NDArray[np.uint8] = torch.cat(images).cpu().numpy()
        return decoded

    def close(self) -> None:
        """``Backend.close``."""
        self._caches = []
        del self._model, self._decoder, self._embed


class _Rows:
    """The first rows of a cache, as the model takes a cache."""

    def __init__(self, cache: KVCache, rows: int) -> None:
        self.k, self.v = cache.k[:rows], cache.v[:rows]

    def update(self, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """As ``KVCache.update``."""
        self.k[:, :, positions] = k
        self.v[:, :, positions] = v
        return self.k[:, :, :length], self.v[:, :, :length]


def reference(bundle: Bundle, device: str = "cpu") -> Pipeline:
    """``bundle`` on :class:`TorchBackend`. Raises what that raises."""
    return Pipeline(bundle, TorchBackend(bundle, device))
