"""The decoder of clips in C: a video tokenizer as a list of operations of ``decoder.c``.

Frames are images side by side, but for convolutions: these see the two frames before their own, so their input has
three times as many channels. ``decoder.c`` has the layouts, ``par_runtime/video_shapes.py`` the layers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from par_runtime.backends.native.decoder import (
    CONV,
    IMAGE,
    LANES,
    LOOKUP,
    SPACE,
    Operations,
    lanes,
)
from par_runtime.video_shapes import CODEBOOK, FRAMES_BEFORE, Layer, decoder_layers

NORM_EPSILON = 1e-5
SEEN = FRAMES_BEFORE + 1  #: frames that a convolution sees
#: Pixels of all frames of a call at most; more latent frames are decoded in several calls, so that memory does not grow
#: with the length of a clip. 17 frames of 128x128 are one call.
CALL_PIXELS = 2**19


class ClipOperations(Operations):
    """The operations of a video tokenizer's decoder; see :class:`Operations`."""

    def _add_layers(self) -> None:
        dim, self._time = len(self._config["levels"]), 1
        codes = self._keep(self._read(CODEBOOK))
        self._add(LOOKUP, output=self._map, out_channels=lanes(dim), code_dim=dim, weights=codes)
        layers = list(decoder_layers(self._config))
        ends = ("", "")  # norm and swish in front of the last convolution
        for layer, following in pairwise([*layers, None]):
            assert layer is not None
            if layer.kind == "conv":
                stride = following.stride if following is not None and following.kind == "space" else (1, 1, 1)
                self._causal(layer.name, layer.width, layer.out, ends, int(np.prod(stride)), self._free()[0])
            elif layer.kind == "space":
                self._space(layer)
            elif layer.kind == "res":
                self._residual(layer)
            elif layer.kind == "norm":
                assert following is not None
                ends = (layer.name, following.name)
        self._add(IMAGE, input=self._map, in_channels=LANES, time=self._time, scale=255.0, offset=0.5)

    def _residual(self, layer: Layer) -> None:
        name, width, out = layer.name, layer.width, layer.out
        before = self._map
        hidden, other = self._free()
        self._causal(f"{name}.fn.2", width, out, (f"{name}.fn.0", f"{name}.fn.1"), 1, hidden)
        if width != out:
            self._point(f"{name}.residual_fn.0.conv", width, out, input=before, output=other)
            before = other
        self._causal(f"{name}.fn.5", out, out, (f"{name}.fn.3", f"{name}.fn.4"), 1, before, accumulate=1)

    def _causal(
        self, name: str, width: int, out: int, ends: tuple[str, str], parts: int, output: int, **fields: Any
    ) -> None:
        """A convolution of the current map into buffer ``output``, which becomes the current one. ``ends``: the norm
        and the swish in front of it. ``parts``: what its channels are of, each of which begins at a whole vector."""
        columns = parts * lanes(out // parts)
        bias = np.zeros((parts, lanes(out // parts)), np.float32)
        bias[:, : out // parts] = self._read(f"{name}.conv.bias").reshape(parts, -1)
        norm, swish = ends
        if norm:
            fields |= self._norm(width, gain=f"{norm}.weight", shift=f"{norm}.bias", beta=f"{swish}.beta")
            fields["epsilon"] = NORM_EPSILON
        panels = self._keep(self._packing.convolution(f"{name}.conv.weight", SEEN, parts))
        self._add(
            CONV,
            input=self._map,
            output=output,
            in_channels=lanes(width),
            out_channels=columns,
            frames=SEEN,
            edge=1,
            time=self._time,
            past=self.past_floats,
            weights=panels,
            bias=self._keep(bias.reshape(-1)),
            **fields,
        )
        self.past_floats += FRAMES_BEFORE * lanes(width) * (self._height * self._width + 2)
        self._map = output

    def _point(self, name: str, width: int, out: int, norm: str = "", **fields: Any) -> None:
        super()._point(name, width, out, norm, time=self._time, **fields)

    def _space(self, layer: Layer) -> None:
        a, b, c = layer.stride
        output = self._free()[0]
        self._height, self._width, self._time = self._height * b, self._width * c, self._time * a
        self._add(
            SPACE,
            input=self._map,
            output=output,
            in_channels=a * b * c * lanes(layer.out),
            out_channels=lanes(layer.out),
            time=self._time,
            stride_t=a,
            stride_y=b,
            stride_x=c,
        )
        self._map = output


def most_latent(latent: int, pixels: int, time: int, clips: int) -> int:
    """How many of ``latent`` latent frames of ``clips`` clips a call decodes; each is ``time`` frames of ``pixels``."""
    return max(1, min(latent, CALL_PIXELS // (clips * time * pixels)))
