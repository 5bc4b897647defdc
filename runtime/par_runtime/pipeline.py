"""Labels in, images out: a bundle on a backend.

``Pipeline.load`` opens, checks and self-tests a bundle; ``Pipeline.generate`` makes images. Nothing here depends on
which backend runs. Methods take turns (``turns.py``), so threads may share a pipeline.

Letters: B images, R rows (two for a guided image), N tokens, n tokens per group, q positions of one call.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from par_runtime.arguments import choice, cpu_threads, folder, function, number, truth, whole
from par_runtime.backends.base import Backend, MakesImages, image_shape
from par_runtime.backends.choose import check_device, choose
from par_runtime.backends.engines import CAPTURES
from par_runtime.bundle import Bundle, FileCheck
from par_runtime.checked import shown_path
from par_runtime.dtypes import ARITHMETICS, CACHES, DECODER_PRECISIONS, Float, Int
from par_runtime.errors import BundleError, RequestError
from par_runtime.forks import stop_at_the_end, tell_of_forks
from par_runtime.images.opening import Picture
from par_runtime.images.photo import Fit, Pictures
from par_runtime.images.recipe import MadeOn
from par_runtime.images.region import MaskFrom, Named, keep_mask
from par_runtime.known import (
    Known,
    drawn_tokens,
    given_tokens,
    kept_frames,
    known_tokens,
    raster_array,
    sequence_tokens,
)
from par_runtime.loaded import check_scales
from par_runtime.metrics import log_likelihood
from par_runtime.progress import OnPreview, OnStep, Progress, latest_tokens
from par_runtime.request import MOST_OF_A_REQUEST, Settings, class_indices, image_seeds, image_settings
from par_runtime.result import Result
from par_runtime.schedule import Schedule, rows_of
from par_runtime.selftest import LOAD_SECONDS, SELFTEST_SECONDS, SelftestError, check_selftest
from par_runtime.tokenizer import Tokenizer, chunk_images, pixels
from par_runtime.turns import Turn, also_inside, one_at_a_time

if TYPE_CHECKING:
    from par_runtime.backends.engines import Capture
    from par_runtime.backends.kernels.upload import OnBytes

log = logging.getLogger(__name__)

#: The most that the cache of one batch takes by default; larger requests run in several batches.
CACHE_LIMIT_BYTES = 2 * 2**30


@dataclass(eq=False, repr=False)
class Pipeline:
    """A loaded bundle, ready to generate.

    Any number of threads may share it: one call runs at a time, the others wait. In a callback (``on_step``,
    ``on_preview``) of a call, the same thread may call ``decode``, ``preview`` and ``encode``; the other methods raise
    RequestError there. After :meth:`close`, every method raises RequestError.

    A process that is forked after loading may use its copy on a CPU: it starts threads of its own. On a GPU it gets
    CudaError, because CUDA cannot be used after a fork; load the pipeline there. What was loaded stays loaded: the
    bundle's folder may be renamed, removed or replaced, but writing into its weights file is an error at the next call.
    The file is mapped into memory: cutting it off while a call runs ends the process.
    """

    bundle: Bundle
    backend: Backend
    note: str = ""  #: why it runs on the CPU, where ``device`` allowed a GPU; else empty
    threads: int | None = None  #: of the CPU, also for the encoder, which runs there on every backend
    _turn: Turn = field(default=None)  # type: ignore[assignment]  # a copy shares it with the original
    _tokenizer: Tokenizer | None = field(default=None)

    def __post_init__(self) -> None:
        if self._turn is None:
            self._turn = Turn(f"the pipeline of {shown_path(self.bundle.path)}")
        if self._tokenizer is None and self.bundle.image_size is not None:
            self._tokenizer = Tokenizer(self.bundle, self.threads)
        tell_of_forks(self)

    @staticmethod
    def load(
        path: str | Path,
        device: str = "auto",
        *,
        threads: int | None = None,
        selftest: bool = True,
        verify: FileCheck = "auto",
        capture: Capture = "image",
        on_load: OnBytes | None = None,
        arithmetic: str = "auto",
        cache: str = "auto",
        decoder_precision: str = "auto",
    ) -> Pipeline:
        """Load the bundle at ``path``.

        ``device``: "auto" takes an engine of the bundle that fits the first GPU, else the CPU (``note`` gives the
        reason); "cpu"; "cpu-ort" for ONNX Runtime on the CPU; "cuda" or "cuda:1" for an engine on that GPU; "cuda-ort"
        for ONNX Runtime on a GPU. ``threads``: of the CPU, default all cores; more are reduced to these, with a
        warning. ``selftest``: run :meth:`selftest`, for a second at most where every phase ran by then.
        ``verify``: how much of the files of the bundle and the engine is checked, see ``bundle.FileCheck``.
        ``capture``, of an engine: one CUDA graph per "image", one per "call", or "none".
        ``on_load``: called while the weights of an engine of our own kernels come to the GPU, with the bytes that are
        read and how many there are. (Other backends load in one call of a library.)
        ``arithmetic``, of a CPU: what matrices are multiplied in, "fp32", "bf16" or "int8"; activations are rounded to
        it, and fp32 and fp16 weights to bf16. In "int8", weights that are not quantised are multiplied in bf16.
        ``cache``, of the C step: what keys and values are kept in, "fp32" or "bf16".
        ``decoder_precision``, of the C decoder: what it computes its 3x3 convolutions in, "fp32", or "bf16" where the
        CPU has AMX, or is one of AMD with dot products in bf16; elsewhere it stays in fp32. It also holds for clips
        that a CPU decodes beside a GPU.
        "auto" takes what the bundle's calibration has proven (``Bundle.calibration``), else "fp32". A GPU computes in
        its engine's precision.

        Raises BundleError (and its subclass EngineError), RequestError, CudaError.
        """
        path, threads, selftest = folder("path", path), cpu_threads(threads), truth("selftest", selftest)
        choice("verify", verify, get_args(FileCheck))
        choice("capture", capture, CAPTURES)
        check_device(device)
        function("on_load", on_load)
        choice("arithmetic", arithmetic, ("auto", *ARITHMETICS))
        choice("cache", cache, ("auto", *CACHES))
        choice("decoder_precision", decoder_precision, ("auto", *DECODER_PRECISIONS))
        began = time.perf_counter()
        bundle = Bundle.open(path, verify)
        check_scales(bundle)
        backend, note = choose(
            bundle,
            device,
            threads=threads,
            verify=verify,
            capture=capture,
            on_load=on_load,
            arithmetic=arithmetic,
            cache=cache,
            decoder_precision=decoder_precision,
        )
        pipeline = Pipeline(bundle, backend, note, threads)
        log.info("%s: loaded on %s in %.2f s", shown_path(path), backend.info.name, time.perf_counter() - began)
        if note:
            log.info("%s: %s", shown_path(path), note)
        if selftest:
            try:
                pipeline.selftest(LOAD_SECONDS)
            except BaseException as error:  # Ctrl-C too: the caller cannot close it, and a GPU's memory must be freed
                pipeline.close()
                if isinstance(error, SelftestError):  # only then would leaving it out help
                    raise BundleError(f"{error}; selftest=False (--no-selftest) loads it regardless") from error
                raise
        return pipeline

    def close(self) -> None:
        """Free what the backend holds, above all a GPU's memory. The pipeline cannot be used afterwards.

        It waits for a call that another thread is making. A second ``close`` does nothing, unless the first one was
        interrupted: then it frees the rest. Raises RequestError inside a callback.
        """
        self._turn.close(self._free)

    def _free(self) -> None:
        with ExitStack() as parts:  # each is freed, whatever another one raises
            parts.callback(self.backend.close)
            if self._tokenizer is not None:
                parts.callback(self._tokenizer.close)

    def __enter__(self) -> Pipeline:
        self._turn.check_open("with")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Raise RequestError: neither pickle nor copy can take threads, or a GPU's memory, along."""
        raise RequestError(
            f"the pipeline of {self.bundle.path} cannot be copied or sent to another process; call Pipeline.load there"
        )

    def __repr__(self) -> str:
        """For instance ``Pipeline(models/demo, native-cpu 0.1.0 (avx512))``."""
        closed = ", closed" if self._turn.closed else ""
        return f"Pipeline({shown_path(self.bundle.path)}, {self.backend.info.name}{closed})"

    def after_fork(self) -> None:
        """Called in a forked process: a call that another thread was making does not go on there."""
        if not self._turn.mine:
            self.backend.release()

    @one_at_a_time
    def selftest(self, seconds: float = SELFTEST_SECONDS) -> None:
        """Make the bundle's greedy test image and compare its tokens with those of the export.

        It ends after ``seconds``, but not before every phase ran once. If tokens differ, the calls are made again with
        the export's tokens as input: a token may differ only where two candidates tie up to rounding. Raises
        BundleError, RequestError.
        """
        seconds = number("seconds", seconds, 0, math.inf, "a number of seconds, 0 or more")
        began = time.perf_counter()
        check_selftest(self.bundle, self.backend, seconds)
        log.debug("%s: self-test passed in %.2f s", shown_path(self.bundle.path), time.perf_counter() - began)

    @one_at_a_time
    def generate(
        self,
        labels: int | str | Sequence[int | str],
        settings: Settings | Sequence[Settings] | None = None,
        *,
        guidance: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        greedy: bool | Sequence[bool] = False,
        guidance_interval: int | Sequence[int] | None = None,
        images_per_label: int = 1,
        on_step: OnStep | None = None,
        preview_every: int | None = None,
        on_preview: OnPreview | None = None,
        max_batch: int | None = None,
        decode: bool = True,
        keep: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
    ) -> Result:
        """Generate one image per label (class index or name), or ``images_per_label`` of each.

        With ``images_per_label``, all images of the first label come first, then those of the next; "per image" below
        counts all of them.

        Sampling: ``settings`` is one :class:`Settings` for all images, or one per image. Instead of it, the keywords
        ``guidance``, ``temperature``, ``top_k``, ``top_p``, ``greedy`` and ``guidance_interval`` are each a scalar or
        one value per image; None takes the bundle's default. Image i draws with ``seeds[i]``, or with ``seed + i``. An
        image depends on its own seed, label and settings, not on its batch (on a GPU up to the rounding of its engine).

        Batches: at most ``max_batch`` images are in flight (default: as many as a cache of 2 GB serves); larger
        requests run as several batches. ``decode=False`` makes tokens only.

        Progress: ``on_step(done, total)`` is called after every call. After every ``preview_every`` calls,
        ``on_preview(images [b,H,W,3], done, total)`` gets the unfinished images of the batch, see :meth:`preview`.

        Known tokens: where ``keep`` (bool, [H,W] or [B,H,W] of the token grid) is true, ``tokens`` ([N] or [B,N] in
        sequence order) are taken instead of drawn ones. This is inpainting, outpainting, or another class for a part.

        Raises RequestError on a bad value, before any work.
        """
        classes = class_indices(self.bundle, labels)
        if not classes:
            raise RequestError("no labels were given; give at least one class index or name")
        each_at_most = MOST_OF_A_REQUEST // len(classes)
        repeat = whole("images_per_label", images_per_label, 1, each_at_most, f" for {MOST_OF_A_REQUEST} images")
        classes = [index for index in classes for _ in range(repeat)]
        each = image_settings(
            self.bundle,
            len(classes),
            settings,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=greedy,
            guidance_interval=guidance_interval,
        )
        seeds = image_seeds(len(classes), seed, seeds)
        progress = Progress.of(self.bundle, on_step, on_preview, preview_every)
        most, where = self.backend.max_images, f" on {self.backend.info.name}"
        size = self.default_batch if max_batch is None else whole("max_batch", max_batch, 1, most, where)
        decode = truth("decode", decode) and self.bundle.image_size is not None
        timings: dict[str, float] = {}
        started = time.perf_counter()
        parts = [slice(i, i + size) for i in range(0, len(classes), size)]
        progress.total = self.bundle.calls * len(parts)
        known = known_tokens(self.bundle, len(classes), keep, tokens)
        made = [
            self._batch(
                Schedule.of(self.bundle, classes[p], each[p], seeds[p]),
                progress,
                timings,
                decode,
                known and known.part(p),
            )
            for p in parts
        ]
        drawn = np.concatenate([own for own, _ in made])
        images = None
        if decode:  # a backend that makes whole images has decoded them already
            clock = time.perf_counter()
            done = [pixels for _, pixels in made if pixels is not None]
            images = np.concatenate(done) if len(done) == len(made) else self.decode(drawn)
            timings["decode"] = 1e3 * (time.perf_counter() - clock)
        timings["total"] = 1e3 * (time.perf_counter() - started)
        timings["calls"] = self.bundle.calls * len(parts)
        kept = None if known is None else known.keep
        return Result(self.bundle, images, drawn, classes, seeds, each, timings, kept, self.made_on)

    @one_at_a_time
    def score(self, tokens: ArrayLike, labels: int | str | Sequence[int | str]) -> Float:
        """Log-likelihood of ``tokens`` ([N] or [B,N], sequence order) for ``labels``: [B,N] fp32, natural logarithms.

        Teacher-forced, in the same calls as generation, without guidance. Entry k is log p(token k | class, the tokens
        that its call sees); their sum over N is the log-likelihood of the image. Raises RequestError.
        """
        classes = class_indices(self.bundle, labels)
        given = given_tokens(self.bundle, len(classes), tokens)
        out = np.zeros(given.shape, np.float32)
        size = self.default_batch
        for first in range(0, len(classes), size):
            part = slice(first, first + size)
            each = image_settings(self.bundle, len(classes[part]), guidance=1.0)
            schedule = Schedule.of(self.bundle, classes[part], each)
            with rows_of(self.backend, schedule):
                for call, batch, ids, write in schedule.walk(given[part]):
                    stop_at_the_end()
                    logits = self.backend.logits(batch, ids, write)
                    out[part, call.positions] = log_likelihood(logits, given[part, call.positions])
        return out

    @also_inside
    def encode(self, images: Pictures, fit: Fit = "crop") -> Int:
        """Tokens [B,N] in sequence order of ``images``: a path, a PIL image, uint8 [H,W,3], a list of these, or uint8
        [B,H,W,3]; a video bundle takes clips: a path, uint8 [T,H,W,3] or [B,T,H,W,3]. What has another size than the
        bundle's images is cropped, or squeezed (``fit="stretch"``).

        ``score`` and ``generate(keep=, tokens=)`` take such tokens. It runs on the CPU, on every backend. Raises
        RequestError, OSError.
        """
        pixels(self.bundle)
        assert self._tokenizer is not None
        return self._tokenizer.encode(images, fit)

    @also_inside
    def decode(self, tokens: Int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] uint8 of ``tokens`` [B,N] in sequence order; clips [B,T,H,W,3] of a video bundle, also of
        the tokens [B,f*h*w] of the first f latent frames. Raises RequestError on another shape or id.
        """
        pixels(self.bundle)
        tokens = sequence_tokens(self.bundle, tokens, beginning=True)
        size = min(self.backend.max_images, chunk_images(self.bundle))
        chunks = [self.backend.decode(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        return np.concatenate(chunks) if chunks else np.zeros((0, *image_shape(self.bundle)), np.uint8)

    def keep_mask(
        self,
        *,
        change: Named | None = None,
        keep: Named | None = None,
        fit: Fit = "crop",
        mask_from: MaskFrom = "auto",
        photo: Picture | None = None,
        keep_frames: int | None = None,
    ) -> NDArray[np.bool_]:
        """Which tokens stay, bool [h,w] of the token grid, for ``generate(keep=)``: all but those of ``change``, or
        those of ``keep``. A token stays where all of its pixels do.

        Of clips, bool [t,h,w]: the region is the same in all frames, and the first ``keep_frames`` frames stay whole. A
        latent frame stays where all of its frames do. Each of the two may be given alone.

        Such a region is "left", "right", "top", "bottom", "center", "border", "all" or "none"; a box "X0,Y0,X1,Y1" in
        pixels of the model's images, which is what the photo becomes by ``fit``; a mask image (path or PIL image; white
        is the region, ``mask_from`` says what a mask with transparency means); or bool [H,W], one for each pixel.
        ``photo``: the picture that is edited. A mask image must have its shape, and for a box in its pixels the error
        names the box to give. Raises RequestError, also for a missing file; OSError.
        """
        if self.bundle.image_size is None:
            raise RequestError(f"{self.bundle.path}: this bundle ends at tokens and has no pixels; make keep= by hand")
        grid = self.bundle.grid[1:]
        frames = kept_frames(self.bundle, keep_frames)
        if frames is not None and change is None and keep is None:
            return np.broadcast_to(frames[:, None, None], self.bundle.grid).copy()
        mask = keep_mask(
            self.bundle.image_size, grid, change=change, keep=keep, fit=fit, mask_from=mask_from, photo=photo
        )
        if not self.bundle.video:
            return mask
        whole = np.zeros(self.bundle.latent_frames, np.bool_) if frames is None else frames
        return mask[None] | whole[:, None, None]

    def grid_tokens(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """``tokens`` [B,N] in sequence order, placed on the grid: [B,H,W], or [B,T,H,W] for video.

        Any other array with one entry per token can be given too. Raises RequestError.
        """
        raster = raster_array(self.bundle, tokens)
        t, h, w = self.bundle.grid
        return raster.reshape(-1, h, w) if t == 1 else raster.reshape(-1, t, h, w)

    @property
    def made_on(self) -> MadeOn:
        """What computes the images."""
        info = self.backend.info
        own = "" if self.bundle.image_size is None else info.name
        return MadeOn(info.name, info.decoder or own, info.rounding)

    @property
    def default_batch(self) -> int:
        """The default of ``max_batch``: as many guided images as a cache of :data:`CACHE_LIMIT_BYTES` serves."""
        cache, n = self.bundle.cache, self.bundle.n_tokens
        row_bytes = len(cache.inputs) * cache.heads * cache.head_dim * n * 4
        return min(max(1, CACHE_LIMIT_BYTES // (2 * row_bytes)), self.backend.max_images)

    def _batch(
        self,
        schedule: Schedule,
        progress: Progress,
        timings: dict[str, float],
        decode: bool,
        known: Known | None = None,
    ) -> tuple[Int, NDArray[np.uint8] | None]:
        """Tokens [B,N] of one batch; and its images, if the backend makes all calls of a batch at once."""
        backend = self.backend
        clock = time.perf_counter()
        at_once = not progress.preview_every and known is None and not schedule.rows_change
        if isinstance(backend, MakesImages) and at_once:
            made = backend.make_images(schedule.batch, schedule.class_ids, schedule.noise, decode)
            if decode:
                drawn_tokens(self.bundle, backend.info.name, made[0])
            timings["image"] = timings.get("image", 0.0) + 1e3 * (time.perf_counter() - clock)
            progress.add(self.bundle.calls)
            return made
        tokens = np.zeros((schedule.batch.images, self.bundle.n_tokens), np.int64)
        with rows_of(backend, schedule):
            for call, batch, ids, write in schedule.walk(tokens):
                stop_at_the_end()
                drawn = backend.step(batch, ids, write, schedule.noise[:, call.positions])
                if decode or progress.preview_every:
                    drawn_tokens(self.bundle, backend.info.name, drawn, call.positions.start)
                tokens[:, call.positions] = drawn
                if known is not None:
                    known.put(tokens, call.positions)
                name = call.phase.name
                timings[name] = timings.get(name, 0.0) + 1e3 * (time.perf_counter() - clock)
                progress.step(self.preview, tokens, call.positions.stop)
                clock = time.perf_counter()  # callbacks and previews are not counted
        return tokens, None

    @also_inside
    def preview(self, tokens: Int, done: int) -> NDArray[np.uint8]:
        """Images [B,H,W,3] uint8 of the first ``done`` tokens of ``tokens`` [B,N]; of clips [B,T,H,W,3] those
        frames that are begun.

        Each place that has no token yet shows the latest token of its region, or that of the same place in the latent
        frame before. Raises RequestError.
        """
        tokens = sequence_tokens(self.bundle, tokens)
        done = whole("done", done, 1, self.bundle.n_tokens, ", the number of tokens")
        return self.decode(latest_tokens(self.bundle, tokens, done))
