"""What a caller sees while images are made: counted calls, and previews of unfinished images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from par_runtime.arguments import check_returned, function, whole
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import RequestError

OnStep = Callable[[int, int], None]
OnPreview = Callable[[NDArray[np.uint8], int, int], None]


def latest_tokens(bundle: Bundle, tokens: Int, done: int) -> Int:
    """``tokens`` [B,N], of which the first ``done`` are made, with each missing one replaced by the latest token of its
    region.

    Of clips only the latent frames that are begun, [B,f*h*w]; in all but the first, a missing token is that of the same
    place in the latent frame before it.
    """
    if bundle.video and done > bundle.frame_tokens:
        size = bundle.frame_tokens
        k = np.arange(-(-done // size) * size)
        before: Int = tokens[:, np.where(k < done, k, k - size)]
        return before
    if bundle.video:
        tokens = tokens[:, : bundle.frame_tokens]
    n = bundle.group_size
    k = np.arange(tokens.shape[1])
    missing = np.maximum(-(-(k - done + 1) // n), 0)  # groups between k and the latest token of its region
    source = k - missing * n
    # A region that has no token yet takes the latest token of any region.
    latest: Int = tokens[:, np.where(source < 0, done - 1, source)]
    return latest


@dataclass
class Progress:
    """Counts the calls of all batches, and calls ``on_step`` and ``on_preview``."""

    on_step: OnStep | None
    on_preview: OnPreview | None
    preview_every: int | None
    total: int = 0
    done: int = 0

    @staticmethod
    def of(bundle: Bundle, on_step: OnStep | None, on_preview: OnPreview | None, preview_every: int | None) -> Progress:
        """What a caller asks for, of a generation of ``bundle``. Raises RequestError."""
        function("on_step", on_step)
        function("on_preview", on_preview)
        if preview_every is None and on_preview is not None:
            raise RequestError("on_preview needs preview_every, the number of calls between two previews")
        if preview_every is not None:
            preview_every = whole("preview_every", preview_every, 1, None, ", a number of calls")
            if on_preview is None or bundle.image_size is None:
                raise RequestError("preview_every needs an on_preview function and a bundle with a decoder")
        return Progress(on_step, on_preview, preview_every)

    def add(self, calls: int) -> None:
        """Count ``calls`` more."""
        self.done += calls
        if self.on_step is not None:
            check_returned("on_step", self.on_step, self.on_step(self.done, self.total))

    def step(self, preview: Callable[[Int, int], NDArray[np.uint8]], tokens: Int, tokens_done: int) -> None:
        """Count one call; ``tokens`` [B,N] of the batch, of which the first ``tokens_done`` are made."""
        self.add(1)
        if self.preview_every and self.on_preview and self.done % self.preview_every == 0:
            returned = self.on_preview(preview(tokens, tokens_done), self.done, self.total)
            check_returned("on_preview", self.on_preview, returned)
