"""Single products on a GPU: compared with PyTorch once, then timed in a graph of launches.

Every launch of the graph has another matrix, until the first would have left the cache: a product is a stream of
weights. Letters as in ``kernels/sources/step.py``: M rows, K rows and N columns of a matrix.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from par_export.card.lines import Emit, check
from par_export.card.product_files import ProductKernels
from par_export.card.subject import POOL_NUMBERS, STD, as_type, random_numbers
from par_export.kernels.product_trials import Product, Trial
from par_export.kernels.tile_shapes import numbers_of
from par_runtime.backends import cuda
from par_runtime.backends.kernels.modules import Module, Prepared
from par_runtime.bench.gpu import runs_ms
from par_runtime.bench.pool import Pool
from par_runtime.bench.suites.gpu import PRODUCTS

ALLOWED = 2e-3  #: largest ||out - reference|| / ||reference||, reference in fp32
LAUNCHES = 48  #: of a graph, at least
MOST_LAYERS = 192  #: matrices, at most; of PAR-L's wo so many are 400 MB
REPEATS = 5
EPS = 1e-5  #: of a norm
POWER = 2.0  #: that the gains are to be multiplied with
#: Numbers that only some shapes have.
NOT_MANY = {"columns": 0, "block_rows": 0, "depth": 0, "ahead": 0, "held": 0}


def time_products(spec: Mapping[str, Any], emit: Emit) -> None:
    """Check and time the trials in the file ``plan``, whose kernels are in ``folder``, on GPU ``index``.

    ``torch``: where PyTorch computes references; ``cold_bytes``: of matrices that the launches of a graph read;
    ``until``: by ``time.monotonic`` none is begun after it. Emits a ``product`` line for each trial that is right, in
    microseconds, and a check for each that is not. Raises CudaError, EngineError, OSError.
    """
    entries = json.loads(Path(spec["plan"]).read_text())
    kernels = ProductKernels.read(Path(spec["folder"]))
    tried = [(Trial.from_json(entry["trial"]), entry) for entry in entries]
    with ExitStack() as held:
        # Held until the end: PyTorch would find a context that was destroyed.
        device = held.enter_context(cuda.Device.open(spec["index"]))
        stand = _Stand(device, torch.device(spec["torch"]), [trial for trial, _ in tried], spec["cold_bytes"], held)
        for product, of_product in groupby(tried, key=lambda each: each[0].product):
            own, right = list(of_product), list[float]()
            if time.monotonic() > spec["until"]:
                return
            with ExitStack() as memory:
                bench = _Bench(stand, product, [trial for trial, _ in own], memory)
                for trial, entry in own:
                    if time.monotonic() > spec["until"]:
                        break
                    right += _one(bench, trial, entry, kernels, emit)
            if right:
                line = check(f"{PRODUCTS}: {product}", True, f"shapes that are right: {len(right)}")
                emit(**line, error=max(right), allowed=ALLOWED)


def _one(bench: _Bench, trial: Trial, entry: Mapping[str, Any], kernels: ProductKernels, emit: Emit) -> Sequence[float]:
    """Check a trial and, if it is right, time it; returns its error then, else nothing."""
    emit("begin", name=entry["check"])
    name = entry["kernel"]
    kernel = kernels.kernels[name]
    with Module(kernel, kernels.cubin(name), most_shared=True) as module:
        error, left = bench.error(trial, module)
        if not error <= ALLOWED or left:  # NaN is not small
            text = f"error {error:.2g}, allowed {ALLOWED:g}; {left} counters are not zero afterwards"
            emit(**check(entry["check"], False, text), error=error, allowed=ALLOWED)
            return ()
        emit(
            "product",
            name=name,
            model=trial.product.model,
            kernel=trial.product.kind,
            rows=trial.product.rows,
            **(NOT_MANY | numbers_of(trial.tile)),
            parts=trial.tile.parts,
            at_once=trial.at_once,
            chosen=entry["chosen"],
            model_us=trial.model_us,
            samples_us=bench.samples_us(trial, module),
            error=error,
            registers=kernel.registers,
            shared=kernel.shared,
            compiler=kernels.compiler,
        )
        return (error,)


class _Stand:
    """A GPU, a stream on it, staging memory of the host, and a pool of random weights, for all ``trials``."""

    def __init__(
        self, device: cuda.Device, where: torch.device, trials: Sequence[Trial], cold_bytes: int, held: ExitStack
    ) -> None:
        self.device, self.where, self._cold_bytes = device, where, cold_bytes
        self.stream: cuda.Stream = held.enter_context(device.stream())
        size = max(trial.packed_bytes * self.layers(trial) for trial in trials)
        of_scales = max(trial.scale_bytes * self.layers(trial) for trial in trials)
        self.pool: cuda.Buffer = held.enter_context(device.allocate(size, "random weights"))
        self.scales: cuda.Buffer = held.enter_context(device.allocate(max(of_scales, 2), "random scales"))
        most = [max(trial.packed_bytes, trial.scale_bytes) for trial in trials]
        most += [4 * one.rows * max(one.stride, one.out_stride) for one in {trial.product for trial in trials}]
        self._staging: cuda.Pinned = held.enter_context(device.pinned(max(most)))
        with Pool(device, self.stream, as_type(random_numbers(0, STD, POOL_NUMBERS), "*fp16")) as numbers:
            numbers.fill(self.pool.pointer, size)  # as codes its bytes are as good as any
            numbers.fill(self.scales.pointer, max(of_scales, 2))

    def layers(self, trial: Trial) -> int:
        """Matrices that the launches of a graph read, one after the other."""
        return max(2, min(MOST_LAYERS, -(-self._cold_bytes // (trial.packed_bytes + trial.scale_bytes))))

    def put(self, address: int, numbers: Tensor) -> None:
        """Write ``numbers`` to the device."""
        content = numbers.contiguous().view(-1).view(torch.uint8)
        torch.from_numpy(self._staging.array)[: content.numel()].copy_(content)
        self.stream.upload(address, self._staging, content.numel())
        self.stream.synchronize()

    def get(self, address: int, kind: torch.dtype, *shape: int) -> Tensor:
        """Numbers of the device, where PyTorch computes."""
        size = math.prod(shape) * kind.itemsize
        self.stream.download(self._staging, address, size)
        self.stream.synchronize()
        return torch.from_numpy(self._staging.array[:size].copy()).view(kind).reshape(shape).to(self.where)


class _Bench:
    """The numbers of a product, the same for all of its ``trials``, and the memory of their launches."""

    def __init__(self, stand: _Stand, product: Product, trials: Sequence[Trial], held: ExitStack) -> None:
        self._stand, self._product = stand, product
        self._packed_as: tuple[int, ...] = ()
        rows, tiles = product.rows, max(trial.tile_columns for trial in trials)
        sums = [trial.tile_columns * trial.tile.split * rows * trial.tile.BN for trial in trials]
        sizes = {
            "h": rows * product.stride * 2,
            "ss": rows * product.squares * 4,
            "gains": (product.power_at + 4) * 4,
            "g": rows * product.out_stride * 2,
        }
        if product.residual:
            sizes = {
                "inputs": rows * product.stride * 2,
                "gains": product.columns * 4,
                "x": rows * product.out_stride * 4,
                "h": rows * product.out_stride * 2,
                "ss": rows * tiles * 4,
                "partial": max(sums) * 4,
                "counters": max(trial.grid[0] * trial.grid[1] for trial in trials) * 4,
            }
        sizes["weights"] = max(trial.packed_bytes for trial in trials)
        sizes |= {"scales": max(trial.scale_bytes for trial in trials)} if product.bits else {}
        self._sizes = sizes
        buffers = {name: held.enter_context(stand.device.allocate(size, name)) for name, size in sizes.items()}
        self._at = {name: buffer.pointer for name, buffer in buffers.items()}
        random = torch.Generator(stand.where).manual_seed(1)
        draw = partial(torch.randn, device=stand.where, generator=random)
        # Pairs of gate and up come in sixteen columns. What lies behind K is NaN, which no kernel may let through.
        columns = product.columns if product.residual else -(-product.columns // 16) * 16
        self._inputs = draw(rows, product.stride).half()
        self._inputs[:, product.depth :] = float("nan")
        if product.bits:
            most = 2 ** (product.bits - 1)  # int8 does without its least code
            least, shape = -most if product.bits == 4 else 1 - most, (columns, product.depth)
            self._codes = torch.randint(least, most, shape, device=stand.where, generator=random)
            scales = draw(columns, product.depth // product.group).abs() + 0.5
            self._scales = (scales * (2 / most * product.depth**-0.5)).half()
            matrix = self._codes * self._scales.float().repeat_interleave(product.group, 1)
        else:
            self._matrix = (draw(columns, product.depth) * product.depth**-0.5).half()
            matrix = self._matrix.float()
        self._x = draw(rows, product.out_stride)
        self._squares = (1 + draw(rows, product.squares) ** 2) * (product.depth / 2 / product.squares)
        self._gains = draw(product.columns).abs()
        sums_of = self._inputs[:, : product.depth].float() @ matrix.T  # [M, N]
        self._expected = self._of_residual(sums_of) if product.residual else self._of_gates(sums_of)

    def error(self, trial: Trial, module: Module) -> tuple[float, int]:
        """||out - reference|| / ||reference|| of one launch, the largest of all that it writes, NaN if one is none; and
        how many counters are not zero afterwards.
        """
        self._reset(trial)
        self._launches(trial, module, [0], {}).enqueue()
        self._stand.stream.synchronize()
        errors, counted = [_relative(got, self._expected[name]) for name, got in self._left(trial).items()], 0
        if self._product.residual:
            squares = self._stand.get(self._at["ss"], torch.float32, self._product.rows, trial.tile_columns)
            errors.append(_relative(squares.sum(1), self._expected["ss"]))
            counters = self._stand.get(self._at["counters"], torch.int32, self._sizes["counters"] // 4)
            counted = int(counters.count_nonzero())
        return max(errors, key=lambda error: (math.isnan(error), error)), counted

    def samples_us(self, trial: Trial, module: Module) -> list[float]:
        """Microseconds of a launch, in each of some runs of a graph of them."""
        layers = self._stand.layers(trial)
        count = layers * -(-LAUNCHES // layers)
        pools = {"weights": self._stand.pool.pointer, "scales": self._stand.scales.pointer}
        prepared = self._launches(trial, module, [i % layers for i in range(count)], pools)
        stream = self._stand.stream
        with stream.capture() as captured:
            prepared.enqueue()
        with captured.graph as graph:
            took = runs_ms(self._stand.device, stream, partial(graph.launch, stream), REPEATS)
        return [1e3 * ms / count for ms in took]

    # -- private ------------------------------------------------------------------------------------------------------

    def _launches(self, trial: Trial, module: Module, layers: Sequence[int], pools: Mapping[str, int]) -> Prepared:
        """``pools``: where matrices and scales of all layers are, in place of the ones that are compared."""
        launch = trial.launch("product")
        addresses = {**self._at, **pools}
        return Prepared({"product": module}, [(launch, layer) for layer in layers], addresses, self._stand.stream)

    def _reset(self, trial: Trial) -> None:
        """Everything as before the first launch: inputs, the packed matrix, and NaN in what is to be written."""
        stand, at = self._stand, self._at
        for name, size in self._sizes.items():
            if name not in ("weights", "scales"):
                stand.stream.fill(at[name], 0 if name == "counters" else 0xFF, size)
        if self._product.residual:
            stand.put(at["inputs"], self._inputs)
            stand.put(at["gains"], self._gains)
            stand.put(at["x"], self._x)
        else:
            stand.put(at["h"], self._inputs)
            stand.put(at["ss"], self._squares)
            stand.put(at["gains"] + 4 * self._product.power_at, torch.tensor([POWER]))
        tile = trial.tile
        packed_as = tile.BN, tile.BK, tile.parts
        if packed_as == self._packed_as:  # shapes that lie alike follow each other
            return
        self._packed_as = packed_as
        if tile.bits:
            stand.put(at["weights"], packed_codes(self._codes, tile.BN, tile.BK, tile.bits, tile.sub))
            stand.put(at["scales"], packed_scales(self._scales, tile.BN, trial.groups))
        else:
            stand.put(at["weights"], packed(self._matrix, *packed_as))

    def _left(self, trial: Trial) -> dict[str, Tensor]:
        """What a launch has left, in fp32."""
        product = self._product
        kinds = {"x": torch.float32, "h": torch.float16} if product.residual else {"g": torch.float16}
        read: Callable[..., Tensor] = self._stand.get
        left = {name: read(self._at[name], kind, product.rows, product.out_stride) for name, kind in kinds.items()}
        own = {name: numbers[:, : product.out_columns].float() for name, numbers in left.items()}
        if product.residual:
            own["x"] -= self._x[:, : product.out_columns]  # what was added alone: x would hide its errors
        return own

    def _of_gates(self, sums: Tensor) -> dict[str, Tensor]:
        """g: silu(gate) * up of every pair; partners lie 8 apart in 16 columns."""
        mean = self._squares.sum(1, keepdim=True) / self._product.depth
        pairs = (sums * (POWER * (mean + EPS).rsqrt())).reshape(len(sums), -1, 2, 8)
        gate, up = (pairs[:, :, i].reshape(len(sums), -1)[:, : self._product.out_columns] for i in (0, 1))
        return {"g": torch.nn.functional.silu(gate) * up}

    def _of_residual(self, sums: Tensor) -> dict[str, Tensor]:
        """What is added to x, h, and the sums of squares of the new rows of x."""
        added = sums[:, : self._product.columns]
        new = self._x[:, : self._product.columns] + added
        return {"x": added, "h": new * self._gains, "ss": new.square().sum(1)}


def packed(matrix: Tensor, bn: int, bk: int, parts: int) -> Tensor:
    """``matrix`` [N, K], its columns as they are packed, in the panels of ``sources/pack.py``: [tiles, blocks of K,
    parts, BN, BK / parts], zeros behind its ends.
    """
    columns, depth = matrix.shape
    tiles, blocks = -(-columns // bn), -(-depth // bk)
    whole = torch.nn.functional.pad(matrix, (0, blocks * bk - depth, 0, tiles * bn - columns))
    return whole.reshape(tiles, bn, blocks, parts, bk // parts).permute(0, 2, 3, 1, 4).contiguous()


def packed_codes(codes: Tensor, bn: int, bk: int, bits: int, sub: int) -> Tensor:
    """``codes`` [N, K], their columns as they are packed, in the pieces of ``sources/pack.py``: bytes [tiles, pieces,
    BN, SUB] of a code each with half of its range added, of int4 two; the code 0 behind their ends.
    """
    columns, depth = codes.shape
    tiles, blocks, half = -(-columns // bn), -(-depth // bk), 2 ** (bits - 1)
    whole = torch.nn.functional.pad(codes, (0, blocks * bk - depth, 0, tiles * bn - columns)) + half
    pieces = whole.reshape(tiles, bn, -1, 8 // bits, sub).permute(0, 2, 3, 1, 4)  # of int4 both halves of a byte
    joined = pieces[:, :, 0] if bits == 8 else pieces[:, :, 0] + 16 * pieces[:, :, 1]
    return joined.to(torch.uint8).contiguous()


def packed_scales(scales: Tensor, bn: int, groups: int) -> Tensor:
    """``scales`` [N, K / GROUP] in the order of the panels: [tiles, groups, BN], zeros where there are none."""
    columns, own = scales.shape
    tiles = -(-columns // bn)
    whole = torch.nn.functional.pad(scales, (0, groups - own, 0, tiles * bn - columns))
    return whole.reshape(tiles, bn, groups).permute(0, 2, 1).contiguous()


def _relative(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||; NaN if one of ``got`` is none."""
    return float((got - wanted).norm() / wanted.norm())
