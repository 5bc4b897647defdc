"""The PyTorch baseline of ``parvis bench``: generation with a static cache, eager or compiled, timed call by call.

This is how the published code runs: key-value caches of the full length N, allocated once; attention over all N slots
in every call, however few are filled; guidance and sampling in PyTorch after each call. Blocks, embeddings, head and
sampling are those of ``transformer.py`` and ``generation.py``, so the tokens are those of the reference generation
too. With ``compiled`` the same step runs through ``torch.compile``: static shapes, one compilation for each of the
query lengths 1 and n, which is not timed.

On CUDA, ``compiled`` is the best that PyTorch makes of it, a rival and not a replica. The decoder is compiled too, and
heads whose size none of PyTorch's fused attention kernels takes (100, of PAR-3B, in fp16) are stored wider: they want
multiples of 16 bytes. Eager keeps heads as they are, and says that its attention is slow.

Architecture, grid, precision and sampling settings are those of a bundle. The weights of the bundle are not read: they
have the layout of its graphs, which this package does not know, and speed does not depend on their values. Random
weights take their place, or those of a ``checkpoint``. A CPU computes in fp32, as the bundle's ``step.onnx`` does;
CUDA computes in the bundle's precision.

Letters: B images, R rows (2B when guided), N tokens, n tokens per group, q positions of one call, V codes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from par_model.blank import with_weights
from par_model.config import VideoTokenizerConfig, VQConfig
from par_model.dtypes import PRECISION_DTYPE
from par_model.generation import cumulative, sample, uniforms
from par_model.manifest import ManifestError, config_from_manifest, read_manifest, tokenizer_from_manifest
from par_model.ordering import phases, token_order
from par_model.running import Clock, reason_of, running_sum
from par_model.shapes import without_weights
from par_model.transformer import PAR, KVCache
from par_model.video import FSQ, VideoTokenizer, to_pixels
from par_model.vq import VQModel

#: PyTorch's fused attention kernels for CUDA take heads of a multiple of so many bytes.
FUSED_HEAD_BYTES = 16
#: Shapes for which a function is compiled, at most. PyTorch would stop at 8; each batch size has two shapes of its own.
MOST_SHAPES = 256
EAGER_DECODER = "eager decoder"
WITHOUT_FUSED = "heads of {} fit none of PyTorch's fused kernels, so keys and values are copied to fp32 in every call"


class BaselineError(RuntimeError):
    """The baseline cannot run here; the message is one line with the reason and what to do."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the same for all images of a batch. ``sums``: as of :func:`generation.sample`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    sums: Callable[[Tensor], Tensor] = cumulative


@dataclass
class State:
    """One batch that is being generated, in static buffers: no call allocates one of them or changes a shape.

    ``tokens`` [B,N]; ``labels`` [R], the rows without class last; a cache per layer; ``mask`` [N,N], true where a
    position attends to a slot; ``noise`` [B,N]; ``guidance`` [] fp32.
    """

    tokens: Tensor
    labels: Tensor
    caches: list[KVCache]
    mask: Tensor
    noise: Tensor
    guidance: Tensor
    guided: bool


def step(model: PAR, state: State, positions: Tensor, sampling: Sampling) -> None:
    """One call: write the tokens of ``positions`` [q] into ``state.tokens``, and keys and values into the caches."""
    tokens = state.tokens.repeat(2, 1) if state.guided else state.tokens
    x = model.embed(tokens, state.labels, positions)
    x = model.blocks(x, positions, state.mask[positions], state.caches)
    logits = model.head(x)
    if state.guided:
        cond, uncond = logits.chunk(2)
        logits = uncond + (cond - uncond) * state.guidance
    if sampling.greedy:
        drawn = logits.argmax(-1)
    else:
        noise = state.noise[:, positions]
        drawn = sample(logits, noise, sampling.temperature, sampling.top_k, sampling.top_p, sampling.sums)
    state.tokens[:, positions] = drawn


def decode(vq: VQModel | VideoTokenizer, tokens: Tensor, place: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Images [B,H,W,3] uint8 of ``tokens`` [B,N] in sequence order, or clips [B,T,H,W,3].

    ``place`` [N] puts the tokens into the raster order of ``grid``.
    """
    if isinstance(vq, VideoTokenizer):
        codes = vq.quantizers.lookup(tokens[:, place].view(-1, *grid)).to(next(vq.parameters()).dtype)
        return to_pixels(vq.decode_codes(codes)).contiguous()
    # Not by vq.decode, which checks the codes, for which the host would wait for the device.
    pixels = vq.decode_codes(vq.quantize.lookup(tokens[:, place].view(-1, *grid[1:])))
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Baseline:
    """A PyTorch model of a bundle's architecture that makes batches and measures how long each call takes.

    ``tokens`` [B,N] and ``images``, [B,H,W,3] uint8 or clips [B,T,H,W,3] (None without a decoder), are those of the
    last batch; the next batch overwrites the tokens. ``name`` is "torch eager" or "torch compiled", ``version`` is
    PyTorch's.
    """

    tokens: Tensor
    images: Tensor | None = None

    def __init__(
        self,
        bundle: str | Path,
        *,
        threads: int | None = None,
        compiled: bool = False,
        device: str = "cpu",
        checkpoint: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        """Make the model that the manifest of ``bundle`` describes.

        ``threads`` sets PyTorch's threads for the whole process. Weights are random, except with a ``checkpoint`` and
        a ``tokenizer``. Raises BaselineError, CheckpointError, OSError.
        """
        try:
            manifest = read_manifest(bundle)
            self.config, tokenizer_config = config_from_manifest(manifest), tokenizer_from_manifest(manifest)
        except ManifestError as error:
            raise BaselineError(f"{bundle}: {error}") from error
        self.device = _device(device)
        self.dtype = (
            torch.float32 if self.device.type == "cpu" else PRECISION_DTYPE.get(manifest["precision"], torch.float16)
        )
        self.name = "torch compiled" if compiled else "torch eager"
        self.version: str = torch.__version__
        self.compiled = compiled
        if compiled:
            _check_compiler(self.device)
            torch._dynamo.config.recompile_limit = MOST_SHAPES
        if threads is not None:
            torch.set_num_threads(threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as the published script does
        defaults = manifest["defaults"]
        self._sampling = Sampling(
            defaults["temperature"], defaults["top_k"], defaults["top_p"], sums=running_sum if compiled else cumulative
        )
        self._model = with_weights(without_weights(PAR, self.config), checkpoint, self.dtype, self.device)
        self._vq = None if tokenizer_config is None else self._decoder(tokenizer_config, tokenizer)
        order = torch.from_numpy(token_order(self.config))
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order))
        self._place = self._place.to(self.device)
        # On CUDA this mode also captures the step as one CUDA graph; on a CPU it changes nothing.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._step: Callable[..., None] = (
            torch.compile(step, dynamic=False, fullgraph=True, mode=mode) if compiled else step
        )
        self._graphs = compiled and self.device.type == "cuda"
        self._decode: Callable[..., Tensor] = (
            torch.compile(decode, dynamic=False, fullgraph=True, mode=mode) if self._graphs else decode
        )
        #: Numbers of a head that are stored, of keys and of values.
        self.head_width = stored_head(self.config.head_dim, self.dtype) if self._graphs else self.config.head_dim
        #: Why the times are not those of what ``name`` says, as lines; known after the first batch.
        self.doubts: tuple[str, ...] = ()
        self._state: State | None = None
        self._warm: set[tuple[int, bool, Sampling]] = set()

    def _decoder(self, config: VQConfig | VideoTokenizerConfig, path: str | Path | None) -> VQModel | VideoTokenizer:
        """The tokenizer without its encoder, which has no part in generation."""
        vq: Any = without_weights(VideoTokenizer if isinstance(config, VideoTokenizerConfig) else VQModel, config)
        if path is not None:  # a checkpoint has the keys of both halves, so the encoder is removed after loading
            vq = with_weights(vq, path, self.dtype, self.device)
        if isinstance(config, VideoTokenizerConfig):
            # What is no weight follows from the levels; on the device "meta" it has no numbers.
            vq.quantizers = FSQ(config.levels).to(self.device)
            del vq.encoder_layers
        else:
            del vq.encoder, vq.quant_conv
        return vq if path is not None else with_weights(vq, None, self.dtype, self.device)

    @torch.no_grad()
    def run(
        self,
        images: int,
        guidance: float,
        *,
        greedy: bool = False,
        seed: int = 0,
        calls: Collection[int] | None = None,
        decoder: bool = True,
    ) -> tuple[dict[str, list[float]], float]:
        """Make a batch: image i of class i with the seed ``seed + i``; ``guidance`` > 1 runs every image twice.

        Returns the milliseconds of each call by phase (prefill, sequential, transition, group, decoder; phases without
        calls are absent) and the milliseconds of the whole batch, from labels to uint8 pixels. ``calls`` runs only
        these calls of an image, counted from 0: every call attends over the full length, so all calls of a phase cost
        the same. ``decoder=False`` ends at tokens. Raises BaselineError, MemoryError.
        """
        if images < 1:
            raise BaselineError(f"{images} images: expected 1 or more")
        sampling = Sampling(greedy=True) if greedy else self._sampling
        try:
            self._warm_up(images, guidance, sampling, decoder)
            return self._run(images, guidance, sampling, seed, calls, decoder)
        except Exception as error:
            if _without_memory(error):
                raise MemoryError(f"{self.name}: {reason_of(error)}") from error
            raise

    def _run(
        self,
        images: int,
        guidance: float,
        sampling: Sampling,
        seed: int,
        calls: Collection[int] | None,
        decoder: bool,
    ) -> tuple[dict[str, list[float]], float]:
        whole, clock = Clock(self.device), Clock(self.device)
        whole.mark()
        state = self._start(images, guidance, seed)
        call, names = 0, list[str]()
        clock.mark()
        for phase in phases(self.config):
            for i in range(phase.repeat):
                if calls is None or call in calls:
                    start = phase.start + i * phase.query
                    positions = torch.arange(start, start + phase.query, device=self.device)
                    self._step(self._model, state, positions, sampling)
                    clock.mark()
                    names.append(phase.name)
                call += 1
        self.tokens, self.images = state.tokens, None
        if decoder and self._vq is not None:
            self.images = self._decoded(state)
            clock.mark()
            names.append("decoder")
        whole.mark()
        took: dict[str, list[float]] = {}
        for name, ms in zip(names, clock.laps_ms(), strict=True):
            took.setdefault(name, []).append(ms)
        return took, whole.laps_ms()[0]

    def _decoded(self, state: State) -> Tensor:
        """The images of ``state``; one after the other by a compiled decoder.

        One image keeps a GPU busy, and the memory of a graph is never freed: several gigabytes for 8 images of 384 px.
        """
        assert self._vq is not None
        if self._decode is decode:
            return decode(self._vq, state.tokens, self._place, self.config.grid)
        # What a CUDA graph returns lies in memory that the next graph uses.
        each = state.tokens.split(1)
        return torch.cat([self._decode(self._vq, one, self._place, self.config.grid).clone() for one in each])

    def forget(self) -> None:
        """Free the memory of the last batch; the next one takes it again.

        Weights stay, what was compiled, and the memory in which CUDA graphs compute, which PyTorch never frees.
        """
        self._state = self.images = None
        self.tokens = torch.zeros(0, 0, dtype=torch.int64)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _start(self, images: int, guidance: float, seed: int) -> State:
        """The state of a new batch, in the buffers of the last batch where the shape is the same.

        The keys of the last batch stay in the caches: they are masked until they are overwritten.
        """
        c, guided = self.config, guidance > 1
        state = self._state
        if state is None or not self._fits(images, guided):
            self._state = state = None  # freed first, so that memory never holds two caches
            state = self._state = self._buffers(images, guided)
        labels = torch.arange(images) % c.n_classes
        state.labels.copy_(torch.cat([labels, torch.full_like(labels, c.n_classes)]) if guided else labels)
        state.noise.copy_(torch.from_numpy(np.stack([uniforms(seed + i, c.n_tokens) for i in range(images)])))
        state.guidance.fill_(guidance)
        state.tokens.zero_()
        return state

    def _fits(self, images: int, guided: bool) -> bool:
        """Whether the buffers of the last batch are there, and serve a batch of this shape."""
        return self._state is not None and (len(self._state.tokens), self._state.guided) == (images, guided)

    def _buffers(self, images: int, guided: bool) -> State:
        c, device = self.config, self.device
        rows = 2 * images if guided else images
        caches = [KVCache(rows, c, self.dtype, device, self.head_width) for _ in range(c.n_layers)]
        slots = torch.arange(c.n_tokens, device=device)
        state = State(
            tokens=torch.zeros(images, c.n_tokens, dtype=torch.int64, device=device),
            labels=torch.zeros(rows, dtype=torch.int64, device=device),
            caches=caches,
            mask=slots[None, :] < self._model.visible[:, None],
            noise=torch.zeros(images, c.n_tokens, device=device),
            guidance=torch.ones((), device=device),
            guided=guided,
        )
        for cache in caches:
            for tensor in (cache.k, cache.v):
                tensor.fill_(0)  # maps every page now, and not within the first calls
        if self._graphs:
            # A CUDA graph is replayed at fixed addresses; declare that the tensors that a call writes keep theirs.
            for tensor in (state.tokens, *(t for cache in caches for t in (cache.k, cache.v))):
                torch._dynamo.mark_static_address(tensor)
        return state

    def _warm_up(self, images: int, guidance: float, sampling: Sampling, decoder: bool) -> None:
        """For a new shape: untimed calls of each query length and of the decoder, in which compilation happens.

        For new buffers too where there are CUDA graphs: they are recorded anew.
        """
        key = (images, guidance > 1, sampling)
        if key in self._warm and (self._fits(images, guidance > 1) or not self._graphs):
            return
        skipped = _graphs_skipped() if self._graphs else 0  # asking loads PyTorch's compiler: seconds
        state = self._start(images, guidance, 0)
        # A CUDA graph is recorded in the second call and replayed from the third.
        for _ in range(3 if self.compiled else 1):
            for first, query in {phase.query: (phase.start, phase.query) for phase in phases(self.config)}.values():
                positions = torch.arange(first, first + query, device=self.device)
                try:
                    self._step(self._model, state, positions, sampling)
                except Exception as error:
                    if not self.compiled or _without_memory(error):
                        raise
                    raise BaselineError(
                        f"torch.compile of PyTorch {self.version} failed ({reason_of(error)}); leave the compiled "
                        "baseline out, or install what is missing (a C++ compiler with Python's headers on a CPU, "
                        "Triton on CUDA)"
                    ) from error
        self.doubts = tuple(doubt for doubt in self.doubts if doubt.startswith(EAGER_DECODER))
        if decoder and self._vq is not None:
            self._warm_up_decoder(state)
        if self.device.type == "cuda" and self.head_width != stored_head(self.head_width, self.dtype):
            self.doubts += (f"math attention: {WITHOUT_FUSED.format(self.head_width)}",)
        if self._graphs:
            skipped = _graphs_skipped() - skipped
            if skipped:
                self.doubts += (f"no graphs: PyTorch used no CUDA graph for {skipped} of its compiled functions",)
        self._warm.add(key)

    def _warm_up_decoder(self, state: State) -> None:
        """Untimed calls of the decoder. One that cannot be compiled runs eagerly from here on, and its rows say so."""
        if self._decode is not decode:
            try:
                for _ in range(3):
                    self._decoded(state)
                return
            except Exception as error:  # of the compiler, or of a graph that could not be recorded
                if _without_memory(error):
                    raise
                self._decode = decode
                self.doubts += (
                    f"{EAGER_DECODER}: torch.compile of PyTorch {self.version} failed ({reason_of(error)})",
                )
        self._decoded(state)


def stored_head(head_dim: int, dtype: torch.dtype) -> int:
    """The smallest size of ``head_dim`` or more that PyTorch's fused attention kernels for CUDA take in ``dtype``."""
    multiple = FUSED_HEAD_BYTES // dtype.itemsize
    return -(-head_dim // multiple) * multiple


def _without_memory(error: Exception) -> bool:
    """Whether memory ran out. The compiler wraps such an error."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


def _graphs_skipped() -> int:
    """Compiled functions for which PyTorch could use no CUDA graph, so far."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _device(name: str) -> torch.device:
    """The device called ``name``. Raises BaselineError where it is a GPU that PyTorch cannot use."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaselineError(
            f"device {name}: PyTorch {torch.__version__} sees no CUDA device; give cpu, or install its CUDA build"
        )
    return device


def _check_compiler(device: torch.device) -> None:
    """Raise BaselineError where the C++ compiler is missing that torch.compile needs for a CPU.

    torch.compile itself would raise late, with a long message.
    """
    wanted = os.environ.get("CXX")
    if device.type == "cpu" and not any(shutil.which(name) for name in ([wanted] if wanted else ["g++", "clang++"])):
        raise BaselineError(
            "torch.compile needs a C++ compiler, and there is none "
            f"({f'CXX={wanted}' if wanted else 'no g++ or clang++ on the path'}); install one, or leave the compiled "
            "baseline out"
        )
