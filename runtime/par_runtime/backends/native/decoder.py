"""The decoder in C (``decoder.c``): a tokenizer as a list of operations, its weights in panels, and the buffers.

It takes any tokenizer of a bundle whose manifest says where the decoder's tensors lie. Where it cannot run
(:func:`why_not`), ONNX Runtime decodes. Both compute in fp32, so pixels agree but for rounding: by one grey level.
Where it is asked for, 3x3 convolutions are computed in bf16 (:func:`bf16_form`).

Letters: B images, H and W pixels, K and N channels of a convolution's input and output.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from par_runtime.backends.native.library import STORED
from par_runtime.backends.native.memory import copied, empty
from par_runtime.backends.native.tensors import Tensors
from par_runtime.checked import shown_path
from par_runtime.dtypes import Float
from par_runtime.tokenizer_shapes import BEHIND_CODES, CODEBOOK, decoder_layers

# As in decoder.c
LANES, PANEL = 16, 32
LOOKUP, CONV, UPSAMPLE, POINT, ATTEND, IMAGE, SPACE = range(7)
MAP, ROWS, KEYS, VALUES = range(4)

AMX, DOTS = "amx", "dots"  #: how 3x3 convolutions are computed in bf16

NORM_EPSILON = 1e-6  #: of an image tokenizer's norms
MAPS = (0, 1, 2)  #: buffers of maps; two of them have the size of the image
QUERY, KEY, VALUE = 3, 4, 5  #: buffers of attention
BUFFERS = 6
#: Transformed weights of 3x3 convolutions take four times the memory of plain ones. So many bytes of them are kept, of
#: the layers with the largest maps; the others are transformed in each call, which takes a few percent of it.
KEPT_BYTES = 64 * 2**20

Pointers = ctypes.POINTER(ctypes.c_void_p)
_COUNTS = (
    *("kind", "reads", "writes", "input", "keys", "values", "output", "height", "width", "in_channels"),
    *("out_channels", "groups", "group_channels", "accumulate", "transformed", "amx", "dots", "code_dim", "frames"),
    "edge",
    *("time", "stride_t", "stride_y", "stride_x", "past"),
)


class Op(ctypes.Structure):
    """``Op`` of decoder.c: one operation."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("scale", "offset")),
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "gain", "shift", "beta")),
    )


class Decode(ctypes.Structure):
    """``Decode`` of decoder.c: the buffers of one call."""

    _fields_ = (
        ("ops", ctypes.POINTER(Op)),
        ("n_ops", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("images", "latent", "first", "more")),
        ("tokens", ctypes.c_void_p),
        ("pixels", ctypes.c_void_p),
        ("buffers", Pointers),
        ("sums", Pointers),
        ("past", ctypes.c_void_p),
        ("past_floats", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norm", "weights", "input", "scratch")),
        ("scratch_floats", ctypes.c_int64),
    )


class Packing:
    """Packs weights as the products of ``decoder.c`` take them, with the threads of ``pool``.

    Its functions return arrays that begin at a cache line. Raises BundleError, MemoryError.
    """

    def __init__(self, lib: ctypes.CDLL, pool: ctypes.c_void_p, tensors: Tensors) -> None:
        self.lib, self.tensors, self._pool = lib, tensors, pool

    def convolution(self, name: str, frames: int = 1, parts: int = 1) -> Float:
        """The weights ``name`` of a convolution, stored [N,frames*K,*kernel], as panels [N/PANEL,frames*K',T,PANEL].

        ``frames`` that it sees; T: the numbers of its kernel. ``parts`` of N: each begins at a whole vector. What is
        added is 0.
        """
        stored, dtype = self.tensors.stored(name)
        n, k, taps = len(stored), stored.shape[1] // frames, stored[0, 0].size
        panels = empty((-(-parts * lanes(n // parts) // PANEL), frames * lanes(k), taps, PANEL), np.float32)
        sizes = (STORED[dtype], n, k, frames, taps, parts)
        found = self.lib.parvis_decoder_pack(self._pool, stored.ctypes.data, *sizes, panels.ctypes.data)
        if found > 0:
            raise self.tensors.not_finite(name)
        self._check(found)
        return panels

    def transformed_shape(self, op: Op) -> tuple[int, int]:
        """Panels, and words of 32 bits of one, of the weights of a 3x3 convolution in Winograd's form."""
        return panels_of(op), self.lib.parvis_decoder_winograd_panel(ctypes.byref(op))

    def transformed(self, op: Op) -> Float:
        """The weights of a 3x3 convolution in Winograd's form, of those in panels; with ``dots`` in bf16."""
        to: Float = empty(self.transformed_shape(op), np.float32)
        self._check(self.lib.parvis_decoder_transform(self._pool, ctypes.byref(op), op.weights, to.ctypes.data))
        return to

    def for_amx(self, op: Op) -> NDArray[np.uint16]:
        """The weights of a 3x3 convolution with ``amx`` in bf16, of those in panels."""
        shape = (panels_of(op), self.lib.parvis_decoder_amx_panel(ctypes.byref(op)))
        to: NDArray[np.uint16] = empty(shape, np.uint16)
        self._check(self.lib.parvis_decoder_pack_amx(self._pool, ctypes.byref(op), op.weights, to.ctypes.data))
        return to

    def _check(self, failed: int) -> None:
        if failed:
            raise MemoryError(f"{shown_path(self.tensors.path)}: no memory to pack the decoder's weights")


class Operations:
    """The operations of an image tokenizer's decoder, and the weights that they point to: keep it while they are used.

    ``config``: of the manifest's tokenizer; ``grid``: rows and columns of codes; ``bf16``: how 3x3 convolutions are
    computed in it (:func:`bf16_form`), "" where they are not.
    """

    past_floats = 0  #: numbers that stay of one call for the next, for each clip

    def __init__(self, packing: Packing, config: Mapping[str, Any], grid: tuple[int, int], bf16: str = "") -> None:
        self._packing, self._config, self._read = packing, config, packing.tensors.numbers
        self._arrays: dict[int, NDArray[Any]] = {}  # by address
        self._height, self._width = grid
        self._map = MAPS[0]  # where the current map is
        self._ops: list[Op] = []
        self._add_layers()
        if bf16 == AMX:
            self._pack_for_amx()
        else:
            self._transform_weights(bf16 == DOTS)
        self.array = (Op * len(self._ops))(*self._ops)
        del self._ops, self._packing, self._read  # which hold a file

    def _add_layers(self) -> None:
        self._codes()
        for layer in decoder_layers(self._config):
            getattr(self, f"_{layer.kind}")(layer.name, layer.width, layer.out)

    def _free(self) -> list[int]:
        return [buffer for buffer in MAPS if buffer != self._map]

    def _codes(self) -> None:
        dim, z = self._config["codebook_dim"], self._config["z_channels"]
        other = self._free()[0]
        self._add(LOOKUP, output=other, out_channels=lanes(dim), code_dim=dim, weights=self._keep(self._read(CODEBOOK)))
        self._point(BEHIND_CODES, dim, z, input=other, output=self._map)

    def _conv(self, name: str, width: int, out: int) -> None:
        other = self._free()[0]
        self._winograd(CONV, name, width, out, input=self._map, output=other)
        self._map = other

    def _upsample(self, name: str, width: int, out: int) -> None:
        other = self._free()[0]
        self._height, self._width = 2 * self._height, 2 * self._width
        self._winograd(UPSAMPLE, name, width, out, input=self._map, output=other)
        self._map = other

    def _res(self, name: str, width: int, out: int) -> None:
        hidden, other = self._free()
        self._winograd(CONV, f"{name}.conv1", width, out, f"{name}.norm1", input=self._map, output=hidden)
        if width != out:
            self._point(f"{name}.nin_shortcut", width, out, input=self._map, output=other)
            self._map = other
        self._winograd(CONV, f"{name}.conv2", out, out, f"{name}.norm2", input=hidden, output=self._map, accumulate=1)

    def _attention(self, name: str, width: int, out: int) -> None:
        places = {"q": (ROWS, QUERY), "k": (KEYS, KEY), "v": (VALUES, VALUE)}
        for part, (layout, buffer) in places.items():
            self._point(f"{name}.{part}", width, out, f"{name}.norm", input=self._map, output=buffer, writes=layout)
        attend = {"input": QUERY, "output": QUERY, "keys": KEY, "values": VALUE, "scale": width**-0.5}
        self._add(ATTEND, in_channels=lanes(width), out_channels=lanes(width), reads=ROWS, writes=ROWS, **attend)
        self._point(f"{name}.proj_out", width, out, input=QUERY, output=self._map, reads=ROWS, accumulate=1)

    def _last(self, name: str, width: int, out: int) -> None:
        other = self._free()[0]
        self._winograd(CONV, f"{name}.conv_out", width, out, f"{name}.norm_out", input=self._map, output=other)
        self._add(IMAGE, input=other, in_channels=LANES, scale=127.5, offset=128.0)

    def _transform_weights(self, dots: bool) -> None:
        """Transform what :data:`KEPT_BYTES` allow, from the end: the largest maps are there. With ``dots`` in bf16, but
        for doubled maps.
        """
        left = KEPT_BYTES
        for op in reversed(self._ops):
            if op.kind not in (CONV, UPSAMPLE):
                continue
            op.dots = int(dots and self._rounds(op))
            left -= 4 * math.prod(self._packing.transformed_shape(op))
            if left >= 0:
                self._replace(op, self._packing.transformed(op))
                op.transformed = 1

    def _rounds(self, op: Op) -> bool:
        """Whether a 3x3 convolution is computed in bf16 where dot products are taken."""
        return bool(op.kind == CONV)

    def _pack_for_amx(self) -> None:
        """Pack the weights of every 3x3 convolution in bf16: they take no more memory than plain ones."""
        for op in self._ops:
            if op.kind in (CONV, UPSAMPLE):
                op.amx = 1
                self._replace(op, self._packing.for_amx(op))

    def _replace(self, op: Op, weights: NDArray[Any]) -> None:
        """Other weights for an operation; those in panels are freed."""
        plain, op.weights = op.weights, self._keep(weights, weights.dtype)
        self._arrays.pop(plain)

    def _winograd(self, kind: int, name: str, width: int, out: int, norm: str = "", **fields: Any) -> None:
        """A 3x3 convolution; with a norm, swish follows it."""
        self._weighted(kind, name, self._packing.convolution(f"{name}.weight"), norm, width, out, fields)

    def _point(self, name: str, width: int, out: int, norm: str = "", **fields: Any) -> None:
        """A 1x1 convolution."""
        self._weighted(POINT, name, self._packing.convolution(f"{name}.weight"), norm, width, out, fields)

    def _weighted(
        self, kind: int, name: str, weights: Float, norm: str, width: int, out: int, fields: dict[str, Any]
    ) -> None:
        bias = np.zeros(lanes(out), np.float32)
        bias[:out] = self._read(f"{name}.bias")
        if norm:
            fields |= self._norm(width, gain=f"{norm}.weight", shift=f"{norm}.bias")
        fields |= {"weights": self._keep(weights), "bias": self._keep(bias)}
        self._add(kind, in_channels=lanes(width), out_channels=lanes(out), **fields)

    def _norm(self, width: int, **names: str) -> dict[str, Any]:
        """The fields of an operation behind a group norm: its groups, and tensors [width], by field."""
        fields: dict[str, Any] = {}
        for field, name in names.items():
            padded = np.zeros(lanes(width), np.float32)
            padded[:width] = self._read(name).reshape(-1)
            fields[field] = self._keep(padded)
        groups = self._config["norm_groups"]
        return fields | {"groups": groups, "group_channels": width // groups}

    def _add(self, kind: int, **fields: Any) -> None:
        usual = {"frames": 1, "time": 1, "epsilon": NORM_EPSILON}
        self._ops.append(Op(kind=kind, height=self._height, width=self._width, **(usual | fields)))

    def _keep(self, array: NDArray[Any], dtype: DTypeLike = np.float32) -> int:
        """The address of ``array``, or of a copy in ``dtype`` that begins at a cache line; it stays."""
        array = copied(array, dtype)
        self._arrays[array.ctypes.data] = array
        return array.ctypes.data


def bf16_form(lib: ctypes.CDLL, least_exact: bool = False) -> str:
    """How 3x3 convolutions are computed in bf16 here: with :data:`AMX`, as such; in Winograd's form with :data:`DOTS`,
    AVX-512's dot products, where these are faster than fp32; "" not at all. Linux is asked for AMX.

    ``least_exact``: of the forms that this CPU can compute the one that rounds the most, however fast.
    """
    return ("", AMX, DOTS)[lib.parvis_decoder_bf16(int(least_exact))]


def panels_of(op: Op) -> int:
    """Panels of the weights of an operation."""
    return int(-(-op.out_channels // PANEL))


def lanes(channels: int) -> int:
    """``channels`` rounded up to whole vectors of a map."""
    return -(-channels // LANES) * LANES


def buffer_sizes(lib: ctypes.CDLL, operations: Operations, images: int, threads: int, latent: int = 1) -> list[int]:
    """Numbers of each buffer of calls of up to ``images`` images, or of ``latent`` latent frames of so many clips; the
    last is the scratch memory of one thread.
    """
    found = []
    for first in (1, 0) if operations.past_floats else (1,):  # a clip's first latent frame has fewer frames
        sizes = (ctypes.c_int64 * (2 * BUFFERS + 4))()
        ops = operations.array
        lib.parvis_decoder_sizes(ops, len(ops), images, latent, first, threads, BUFFERS, sizes)
        found.append(list(sizes))
    return [max(each) for each in zip(*found, strict=True)]


class Buffers:
    """The buffers of calls of up to ``images`` images, or of ``latent`` latent frames of so many clips; and the
    structure that gives ``decoder.c`` their addresses.
    """

    def __init__(self, lib: ctypes.CDLL, operations: Operations, images: int, threads: int, latent: int = 1) -> None:
        ops = operations.array
        *lengths, scratch = buffer_sizes(lib, operations, images, threads, latent)
        self.images, self.latent = images, latent
        lengths += [threads * scratch, images * operations.past_floats]
        self._arrays = [empty(length, np.float32) for length in lengths]
        addresses = [array.ctypes.data for array in self._arrays]
        self._maps = (ctypes.c_void_p * BUFFERS)(*addresses[:BUFFERS])
        self._sums = (ctypes.c_void_p * BUFFERS)(*addresses[BUFFERS : 2 * BUFFERS])
        names = ("norm", "weights", "input", "scratch", "past")
        self.call = Decode(
            ops=ops,
            n_ops=len(ops),
            latent=1,
            first=1,
            past_floats=operations.past_floats,
            buffers=self._maps,
            sums=self._sums,
            scratch_floats=scratch,
            **dict(zip(names, addresses[2 * BUFFERS :], strict=True)),
        )
