"""The decoder as a list of launches: tokens in sequence order to images. The network is that of ``graphs/decoder.py``.

One convolution is one launch, whatever comes before and after it: bias, residual, shortcut, upsampling, and the sums
that the next norm needs. A norm of a small map is one more. That of a large map is two: ``moments`` makes a scale and a
shift for each channel out of those sums, ``normalise`` applies them. Maps take turns in three buffers: ``x`` holds what
a block reads, ``padded`` its normalised form, ``y`` what a convolution writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from par_export.errors import BuildError
from par_export.kernels.decoder_tiles import (
    NUMBER_BYTES,
    attention_tile,
    conv_tile,
    divisor,
    pass_tile,
    step_channels,
)
from par_export.kernels.decoder_weights import DecoderWeights
from par_export.kernels.spec import Constant, Planned, Refused, Spec, laid_out, power
from par_export.kernels.targets import Target
from par_model.config import PARConfig, VQConfig
from par_model.ordering import token_order
from par_runtime.backends.engines import POINTER_ALIGN
from par_runtime.backends.program import MOST_LAUNCHES, Launch, Pointer, Profile, Program, Weight
from par_runtime.bundle import Stored

#: Images are decoded in groups of so many that buffers stay below this.
SCRATCH_BYTES = 512 * 10**6
EPSILON = 1e-6  #: of every group norm
MOST_SUMS = 1536  #: of tiles and units, that each block of a norm adds up itself; for more, one kernel does before it
MOST_NUMBERS = 2**31  #: of a map of one image: kernels count them in 32 bits


@dataclass(frozen=True)
class Work:
    """What decoding takes: ``flop`` of its products, and ``bytes`` read and written, each map and weight once a use."""

    launches: int
    flop: float
    bytes: float


def plan(
    vq: VQConfig,
    config: PARConfig,
    stored: Mapping[str, Stored],
    images: Sequence[int],
    precision: str,
    target: Target,
    scratch_bytes: int = SCRATCH_BYTES,
    refused: Refused = frozenset(),
) -> Planned:
    """The program "decoder" for batches of ``images``, its kernels and its weights.

    ``stored``: where tensors of the tokenizer lie, by their names without "vq.". ``precision``: of feature maps; fp32
    multiplies in TF32. ``refused``: kernels that others are to be planned for. Raises BundleError where a tensor is
    missing or of another shape, BuildError where a map is too large.
    """
    return _plan(vq, config, stored, images, precision, target, scratch_bytes, refused)[0]


def work(vq: VQConfig, config: PARConfig, images: int, precision: str, target: Target) -> Work:
    """What decoding a batch of ``images`` takes."""
    return _plan(vq, config, None, (images,), precision, target, SCRATCH_BYTES)[1]


def _plan(
    vq: VQConfig,
    config: PARConfig,
    stored: Mapping[str, Stored] | None,
    images: Sequence[int],
    precision: str,
    target: Target,
    scratch_bytes: int,
    refused: Refused = frozenset(),
) -> tuple[Planned, Work]:
    planned = Planned()
    order = token_order(config)
    place = np.empty(order.size, np.int32)
    place[order] = np.arange(order.size, dtype=np.int32)
    planned.constants["decoder.place"] = place.tobytes()
    planned.weights["decoder.place"] = Weight(place.nbytes, None, 0, None)
    profiles = {}
    done = Work(0, 0, 0)
    one = _Decoder(vq, config, stored, precision, target, planned, 1, refused)
    one.decode(0)
    # A group begins where tokens and images lie at an address that kernels take.
    together = POINTER_ALIGN // math.gcd(POINTER_ALIGN, one.tokens * 8, one.image_bytes)
    most = max(together, scratch_bytes // sum(one.buffers.values()) // together * together)
    for count in images:
        groups = max(1, min(-(-count // most), MOST_LAUNCHES // len(one.launches)))
        launches: list[Launch] = []
        buffers: dict[str, int] = {}
        first = 0
        done = Work(0, 0, 0)
        for group in range(groups):
            left = count - first
            size = min(left, -(-left // together) // (groups - group) * together)
            decoder = _Decoder(vq, config, stored, precision, target, planned, size, refused)
            decoder.decode(first)
            launches += decoder.launches
            buffers = {name: max(size, buffers.get(name, 0)) for name, size in decoder.buffers.items()}
            done = Work(len(launches), done.flop + decoder.flop, done.bytes + decoder.bytes)
            first += size
        profiles[count] = Profile(tuple(launches), (), (), *laid_out(buffers))
    planned.programs["decoder"] = Program(0, (), 0, profiles, {}, 0)
    return planned, done


@dataclass(frozen=True)
class _Map:
    """A feature map [images,height,width,channels] in ``buffer``, and how ``partial`` holds its sums."""

    buffer: str
    height: int
    width: int
    channels: int
    tile: int = 0
    parities: int = 1

    @property
    def pixels(self) -> int:
        return self.height * self.width


class _Decoder:
    """The launches for ``images`` images. ``stored`` None: only to count them; no weights are planned then."""

    def __init__(
        self,
        vq: VQConfig,
        config: PARConfig,
        stored: Mapping[str, Stored] | None,
        precision: str,
        target: Target,
        planned: Planned,
        images: int,
        refused: Refused = frozenset(),
    ) -> None:
        self.vq, self.grid, self.tokens = vq, config.grid[1:], config.n_tokens
        self.precision, self.target, self.planned = precision, target, planned
        self.weights = DecoderWeights(stored, precision, planned)
        self.images = images
        shapes = [(spec, dict(spec.constants)) for spec in refused if spec.source.startswith("decoder")]
        self.gone = {(shape["BM"], shape.get("BN"), spec.warps) for spec, shape in shapes if "BM" in shape}
        self.size = NUMBER_BYTES[precision]
        self.kind = f"*{precision}"
        self.launches: list[Launch] = []
        self.buffers: dict[str, int] = {}
        self.flop = self.bytes = 0.0
        self.image_bytes = 0

    def decode(self, first: int) -> None:
        """All launches for the images from ``first`` on of the batch."""
        vq, (h, w) = self.vq, self.grid
        widths = [vq.channels * m for m in reversed(vq.channel_multipliers)]
        self._lookup(first, h, w)
        x = self._conv(_Map("padded", h, w, vq.z_channels), "decoder.conv_in", widths[0], "x")
        x = self._res(x, "decoder.mid.0", widths[0])
        x = self._attention(x, "decoder.mid.1")
        x = self._res(x, "decoder.mid.2", widths[0])
        for level, width in enumerate(widths):
            name = f"decoder.conv_blocks.{level}"
            for j in range(vq.res_blocks + 1):
                x = self._res(x, f"{name}.res.{j}", width)
                if level == 0:
                    x = self._attention(x, f"{name}.attn.{j}")
            if level != len(widths) - 1:
                x = self._conv(x, f"{name}.upsample.conv", width, _other(x.buffer), up=True)
        self.image_bytes = 3 * x.pixels
        pixels = Pointer("images", first * self.image_bytes)
        self._conv(self._norm(x, "decoder.norm_out"), "decoder.conv_out", 3, "", pixels=pixels)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _res(self, x: _Map, key: str, width: int) -> _Map:
        """A residual block. Its second convolution writes where the first one wrote, which nobody needs any more."""
        other = _other(x.buffer)
        y = self._conv(self._norm(x, f"{key}.norm1"), f"{key}.conv1", width, other)
        shortcut = f"{key}.nin_shortcut" if x.channels != width else ""
        return self._conv(self._norm(y, f"{key}.norm2"), f"{key}.conv2", width, other, before=x, shortcut=shortcut)

    def _attention(self, x: _Map, key: str) -> _Map:
        """One head over all pixels."""
        c, m = x.channels, x.pixels
        y = self._norm(x, f"{key}.norm", swish=False)
        step = step_channels(c, self.precision)
        tile = conv_tile(self.target, self.precision, m, 3, c, -(-c // step), step, 1, self.gone)
        arguments: dict[str, object] = {"x": Pointer(y.buffer)}
        for name in "qkv":
            arguments[f"w_{name}"] = self.weights.filter(f"{key}.{name}", c, c, 1, step)
            arguments[f"bias_{name}"] = self.weights.vector(f"{key}.{name}.bias", (c,))
        arguments["out"] = self._buffer("qkv", 3 * m * c * self.size)
        constants: dict[str, Constant] = {"M": m, "C": c, "BM": tile.pixels, "BN": tile.channels, "BK": step}
        kinds = dict.fromkeys(("x", "w_q", "w_k", "w_v", "out"), self.kind)
        grid = (-(-m // tile.pixels) * -(-c // tile.channels), 3, self.images)
        self._launch("qkv", constants, kinds, arguments, grid, tile.warps, tile.stages)
        self._count(2 * 3 * m * c * c, 4 * m * c, 3 * c * c)

        tile = attention_tile(self.target, self.precision, m, c, self.gone)
        scale = c**-0.5 * math.log2(math.e)
        constants = {"M": m, "C": c, "SCALE": scale, "BM": tile.pixels, "BN": tile.channels, "BC": power(max(c, 16))}
        arguments = {"x": Pointer("qkv"), "out": self._buffer("attended", m * c * self.size)}
        kinds = {"x": self.kind, "out": self.kind}
        grid = (-(-m // tile.pixels), self.images, 1)
        self._launch("attention", constants, kinds, arguments, grid, tile.warps, tile.stages)
        self._count(2 * 2 * m * m * c, 4 * m * c, 0)
        y = replace(x, buffer="attended")
        return self._conv(y, f"{key}.proj_out", c, _other(x.buffer), kernel=1, before=x)

    def _norm(self, x: _Map, key: str, swish: bool = True) -> _Map:
        """The norm of ``x``; with swish, and with a border of zeros, for a convolution of 3x3."""
        c, groups = x.channels, self.vq.norm_groups
        width = c // groups
        unit = _unit(width)
        tiles = x.parities * -(-x.pixels // x.parities // x.tile)
        border = 2 if swish else 0
        padded = (x.height + border) * (x.width + border)
        rows, columns = pass_tile(self.target, padded, c)
        shape: dict[str, Constant] = {"H": x.height, "W": x.width, "C": c, "BORDER": border, "SWISH": swish}
        place: dict[str, Constant] = {"BP": rows, "BC": columns}
        sums: dict[str, Constant] = {"GROUPS": groups, "UNIT": unit, "PARITIES": x.parities, "BM": x.tile}
        sums["EPSILON"] = EPSILON
        arguments: dict[str, object] = {"x": Pointer(x.buffer), "partial": Pointer("partial")}
        arguments["gain"] = self.weights.vector(f"{key}.weight", (c, 1, 1))
        arguments["bias"] = self.weights.vector(f"{key}.bias", (c, 1, 1))
        arguments["out"] = self._buffer("padded", padded * c * self.size)
        kinds = {"x": self.kind, "out": self.kind}
        grid = (-(-padded // rows), -(-c // columns), self.images)
        self._count(0, x.pixels * c + padded * c, 0)
        whole = width == power(width) and c % columns == 0 and columns % width == 0
        if whole and tiles * (columns // unit) <= MOST_SUMS:
            self._launch("norm", shape | sums | {"BT": power(tiles)} | place, kinds, arguments, grid, 4, 1)
            return replace(x, buffer="padded")
        units = power(width // unit)
        sums |= {"M": x.pixels // x.parities, "C": c, "BT": min(power(tiles), max(1, 4096 // units))}
        sums |= {"BU": units, "BC": power(width)}
        arguments["norm"] = self._buffer("norm", 2 * c * 4)
        some = {name: arguments[name] for name in PARAMETERS["moments"]}
        self._launch("moments", sums, {}, some, (groups, self.images, 1), 4, 1)
        some = {name: arguments[name] for name in PARAMETERS["normalise"]}
        self._launch("normalise", shape | place, kinds, some, grid, 4, 1)
        return replace(x, buffer="padded")

    def _lookup(self, first: int, h: int, w: int) -> None:
        """Tokens to the codes' first convolution, with a border of zeros."""
        vq, c = self.vq, self.vq.z_channels
        rows, columns = pass_tile(self.target, (h + 2) * (w + 2), c)
        rows = min(rows, 16)
        constants = {"H": h, "W": w, "C": c, "D": vq.codebook_dim, "V": vq.codebook_size, "BP": rows, "BC": columns}
        arguments: dict[str, object] = {"tokens": Pointer("tokens", first * self.tokens * 8)}
        arguments["place"] = Pointer("decoder.place")
        arguments["codebook"] = self.weights.vector("codebook", (vq.codebook_size, vq.codebook_dim), self.precision)
        arguments["w"] = self.weights.vector("post_quant_conv.weight", (c, vq.codebook_dim, 1, 1))
        arguments["bias"] = self.weights.vector("post_quant_conv.bias", (c,))
        arguments["out"] = self._buffer("padded", (h + 2) * (w + 2) * c * self.size)
        kinds = {"tokens": "*i64", "place": "*i32", "codebook": self.kind, "out": self.kind}
        grid = (-(-(h + 2) * (w + 2) // rows), -(-c // columns), self.images)
        self._launch("lookup", constants, kinds, arguments, grid, 4, 1)
        self._count(2 * h * w * c * vq.codebook_dim, h * w * c, 0)

    def _conv(
        self,
        x: _Map,
        key: str,
        width: int,
        out: str,
        kernel: int = 3,
        up: bool = False,
        before: _Map | None = None,
        shortcut: str = "",
        pixels: Pointer | None = None,
    ) -> _Map:
        """A convolution of ``x``, plus ``before`` or its 1x1 convolution ``shortcut``, into the buffer ``out``.

        ``pixels``: where bytes of images go instead. The result's sums are those of the next norm.
        """
        c, m, target = x.channels, x.pixels, self.target
        side, places = (2, 4) if up else (kernel, 1)
        step = step_channels(c, self.precision)
        steps = side * side * -(-c // step)
        unit = 0 if pixels else _unit(width // self.vq.norm_groups)
        tile = conv_tile(target, self.precision, m, places, width, steps, step, side, self.gone)
        constants: dict[str, Constant] = {"H": x.height, "W": x.width, "C": c, "O": width, "SIDE": side, "UP": up}
        constants |= {"RESIDUAL": before is not None and not shortcut, "OTHER": 0, "UNIT": unit}
        constants |= {"PIXELS": pixels is not None, "BM": tile.pixels, "BN": tile.channels, "BK": step, "OTHER_BK": 16}
        nothing = Pointer(x.buffer)
        arguments: dict[str, object] = {"x": nothing, "w": self.weights.filter(key, c, width, kernel, step, up)}
        arguments["bias"] = self.weights.vector(f"{key}.bias", (width,))
        arguments |= dict.fromkeys(("residual", "other_x", "other_w", "other_bias", "partial"), nothing)
        kinds = dict.fromkeys(("x", "w", "residual", "other_x", "other_w", "out"), self.kind) | {"steps": "i32"}
        arguments["steps"] = steps
        if before is not None and not shortcut:
            arguments["residual"] = Pointer(before.buffer)
            self._count(0, m * width, 0)
        if before is not None and shortcut:
            other_step = step_channels(before.channels, self.precision)
            constants |= {"OTHER": before.channels, "OTHER_BK": other_step}
            arguments["other_x"] = Pointer(before.buffer)
            arguments["other_w"] = self.weights.filter(shortcut, before.channels, width, 1, other_step)
            arguments["other_bias"] = self.weights.vector(f"{shortcut}.bias", (width,))
            self._count(2 * m * width * before.channels, m * before.channels, width * before.channels)
        tiles = places * -(-m // tile.pixels)
        if pixels:
            kinds["out"] = "*u8"
            arguments["out"] = pixels
        else:
            arguments["out"] = self._buffer(out, places * m * width * self.size)
            arguments["partial"] = self._buffer("partial", 2 * tiles * (width // unit) * 4)
        grid = (tiles // places * -(-width // tile.channels), places, self.images)
        self._launch("conv", constants, kinds, arguments, grid, tile.warps, tile.stages)
        self._count(2 * places * m * width * c * side**2, m * c + places * m * width, places * width * c * side**2)
        height, wide = (2 * x.height, 2 * x.width) if up else (x.height, x.width)
        return _Map(out, height, wide, width, tile.pixels, places)

    # -- launches, buffers, weights -------------------------------------------------------------------------------

    def _launch(
        self,
        function: str,
        constants: Mapping[str, Constant],
        kinds: Mapping[str, str],
        arguments: Mapping[str, object],
        grid: tuple[int, int, int],
        warps: int,
        stages: int,
    ) -> None:
        """Add a launch. ``kinds``: types of parameters that are not "*fp32"."""
        dependent = self.target.dependent
        parameters = tuple((name, kinds.get(name, "*fp32")) for name in PARAMETERS[function])
        named = tuple({**constants, "DEPENDENT": dependent}.items())
        source = f"{SOURCES.get(function, 'decoder')}.{function}"
        spec = Spec(source, named, parameters, warps, stages, dependent=dependent)
        self.launches.append(self.planned.launch(spec, grid, arguments))

    def _count(self, flop: float, numbers: float, weights: float) -> None:
        """Count work: ``flop`` and ``numbers`` read and written for each image, ``weights`` for all of them."""
        self.flop += self.images * flop
        self.bytes += (self.images * numbers + weights) * self.size

    def _buffer(self, name: str, size: int) -> Pointer:
        """A place of ``size`` bytes for each image."""
        if size // self.size >= MOST_NUMBERS:
            raise BuildError(
                f"decoder: a feature map of {size // self.size} numbers; kernels count up to {MOST_NUMBERS - 1}: "
                "build with --engine tensorrt"
            )
        self.buffers[name] = max(self.buffers.get(name, 0), self.images * size)
        return Pointer(name)


#: Where a kernel's source is not ``decoder``.
SOURCES = {"qkv": "decoder_attention", "attention": "decoder_attention"}
#: The run-time parameters of each kernel, in order.
PARAMETERS = {
    "lookup": ("tokens", "place", "codebook", "w", "bias", "out"),
    "conv": ("x", "w", "bias", "residual", "other_x", "other_w", "other_bias", "out", "steps", "partial"),
    "moments": ("partial", "gain", "bias", "norm"),
    "normalise": ("x", "norm", "out"),
    "norm": ("x", "partial", "gain", "bias", "out"),
    "qkv": ("x", "w_q", "w_k", "w_v", "bias_q", "bias_k", "bias_v", "out"),
    "attention": ("x", "out"),
}


def _unit(width: int) -> int:
    """Channels that are summed up together: the largest power of two that divides those of a group, at most 16."""
    return divisor(width, 16)


def _other(buffer: str) -> str:
    """The buffer that a block writes which reads ``buffer``."""
    return "y" if buffer == "x" else "x"
