"""The training: Adam on the numbers behind codes and scales, for the divergence from the original's distributions.

Both models see the same images, all positions at once. Nothing but the quantised matrices is trained, and no number of
the result is stored in any other form: the bundle is as large and as fast as without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from par_calibration.errors import CalibrationError
from par_calibration.refine.images import images
from par_calibration.refine.latent import Latent
from par_calibration.refine.loss import distance
from par_calibration.refine.plan import BATCH, Plan
from par_calibration.refine.state import MOMENTS, Moments, State, check_room, load, save
from par_export.restored import model_state, read_weights, restored_model
from par_model.dtypes import bf16_is_fast
from par_model.manifest import config_from_manifest, read_manifest
from par_runtime.bundle import Bundle
from par_runtime.dtypes import DTYPE, Int
from par_runtime.forks import stop_at_the_end
from par_runtime.quantised import Quantised
from par_runtime.system import available_bytes

RATE = 0.008  #: of numbers, in codes a step
SCALES_RATE = 0.1 * RATE  #: of logarithms of scales
WARMING = 20  #: steps in which the rate rises; it falls like half a cosine afterwards
POSITIONS_AT_ONCE = 2048  #: whose activations are in memory together
SAVE_SECONDS = 60.0
#: Bytes for each number of a quantised matrix: the original's 4, and 2 as it is stored; the number's own 4, its
#: gradient 4, Adam's 8; the matrix 4, its gradient 4; copies in bf16; and what the allocator cannot use again. All of
#: these were measured, as what a process grows by on a CPU: models/demo, and ten networks that differ in one size each.
NUMBER_BYTES = 41
LOGIT_BYTES = 35  #: for each logit of the positions that are in memory together
FIXED_BYTES = 205_000_000  #: libraries and their threads
BF16_SHARE = 0.7  #: of the activations in fp32, where products are made in bf16


@dataclass(frozen=True)
class Refined:
    """What a training made."""

    matrices: Mapping[str, Quantised]
    losses: tuple[float, ...]  #: of each step

    def quantiser(self, name: str, *_: object) -> Quantised:
        """As ``quantise.layers.Quantiser``."""
        return self.matrices[name]

    def text(self) -> str:
        """One line for a terminal."""
        few = max(1, min(20, len(self.losses) // 4))
        before, after = (float(np.mean(part)) for part in (self.losses[:few], self.losses[-few:]))
        return f"divergence on the images that were learned from {before:.4f} -> {after:.4f}"


def refine(
    bundle: Bundle,
    plan: Plan,
    start: Callable[[], Mapping[str, Quantised]],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    say: Callable[[str], object] = lambda _: None,
    on_image: Callable[[int, int], object] | None = None,
    on_step: Callable[[int, int], object] | None = None,
) -> Refined:
    """Train from ``start()`` on, or from where ``folder`` has stopped; ``shapes``: those of the trained matrices.

    Raises CalibrationError, BundleError, MemoryError, OSError.
    """
    device = training_device()
    state = load(plan, folder, shapes, device)
    if state is not None and state.step == plan.steps:
        say(f"training: all {plan.steps} steps were there")
    else:
        check_memory(bundle, shapes, device)
        check_room(plan, folder, shapes, bundle.n_tokens)
        tokens = images(bundle, plan, folder, on_image)
        weights = read_weights(bundle)
        if state is None:
            codes = start()
            state = State({n: Latent.of(codes[n], weights[n].to(device).float()) for n in shapes})
        else:
            say(f"training: {state.step} of {plan.steps} steps were there")
        before = torch.get_num_threads()
        torch.set_num_threads(plan.threads or before)
        try:
            _train(_Models(bundle, weights, state.latents, device), state, plan, tokens, folder, say, on_step)
        finally:
            torch.set_num_threads(before)
    stored = DTYPE[bundle.precision]
    return Refined({name: latent.quantised(stored) for name, latent in state.latents.items()}, tuple(state.losses))


def training_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Models:
    """The original, and the same network with matrices from their latent numbers."""

    def __init__(
        self, bundle: Bundle, weights: dict[str, Tensor], latents: Mapping[str, Latent], device: torch.device
    ) -> None:
        self.device, self.latents = device, latents
        self.no_class = bundle.n_classes
        self._config = config_from_manifest(read_manifest(bundle.path))
        self._original = restored_model(bundle, weights, torch.float32, device)
        self._original.requires_grad_(False)
        self._rest = {name: x.to(device).float() for name, x in weights.items() if name not in latents}

    def arithmetic(self) -> AbstractContextManager[object]:
        """bf16 where this device multiplies it fast; sums stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16) if bf16_is_fast(self.device) else nullcontext()

    def gradients(self, plan: Plan, tokens: Int, labels: list[int]) -> float:
        """Set the gradients of all latent numbers, for a batch of ``tokens`` [B,N]; returns the loss."""
        leaves = {name: latent.matrix().requires_grad_() for name, latent in self.latents.items()}
        state = model_state(self._config, {**self._rest, **leaves})
        at_once, loss = max(1, POSITIONS_AT_ONCE // (2 * tokens.shape[1])), 0.0
        for first in range(0, len(tokens), at_once):
            part = torch.from_numpy(tokens[first : first + at_once]).to(self.device)
            classes = torch.tensor(labels[first : first + at_once], device=self.device)
            rows = (part.repeat(2, 1), torch.cat([classes, torch.full_like(classes, self.no_class)]))
            with self.arithmetic():
                with torch.no_grad():
                    wanted = self._original(*rows)
                got = functional_call(self._original, state, rows)
            share = distance(wanted, got, plan.guidance) * (len(part) / len(tokens))
            share.backward()
            loss += float(share.detach())
        for name, latent in self.latents.items():
            of_matrix = leaves[name].grad
            assert of_matrix is not None
            latent.numbers.grad, latent.log_scales.grad = latent.gradients(of_matrix)
            leaves[name].grad = None
        return loss


def _train(
    models: _Models,
    state: State,
    plan: Plan,
    tokens: Int,
    folder: Path,
    say: Callable[[str], object],
    on_step: Callable[[int, int], object] | None,
) -> None:
    numbers, scales = zip(*(latent.trained for latent in state.latents.values()), strict=True)
    groups = [{"params": list(numbers), "rate": RATE}, {"params": list(scales), "rate": SCALES_RATE}]
    optimiser = torch.optim.Adam(groups, lr=RATE, betas=(0.9, 0.99), fused=True)
    if state.moments is not None:
        for name, latent in state.latents.items():
            for values, moments in zip(latent.trained, state.moments[name], strict=True):
                optimiser.state[values] = {"step": torch.tensor(float(state.step), device=models.device), **moments}
    saved = time.monotonic()
    while state.step < plan.steps:
        stop_at_the_end()
        if on_step is not None:
            on_step(state.step, plan.steps)
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * rate_share(state.step, plan.steps)
        picked = plan.batch(state.step)
        loss = models.gradients(plan, tokens[picked], [plan.labels[i] for i in picked])
        if not math.isfinite(loss):
            raise CalibrationError(
                f"--refine {plan.steps}: the loss of step {state.step + 1} is not a finite number; leave --refine out, "
                "and look at the bundle with 'parvis verify'"
            )
        optimiser.step()
        state.step += 1
        state.losses.append(loss)
        if time.monotonic() > saved + SAVE_SECONDS or state.step == plan.steps:
            state.moments = {name: _moments(optimiser, latent) for name, latent in state.latents.items()}
            save(state, plan, folder)
            recent = float(np.mean(state.losses[-20:]))
            say(f"training: {state.step} of {plan.steps} steps, divergence {recent:.4f} (mean of the last 20)")
            saved = time.monotonic()
    if on_step is not None:
        on_step(plan.steps, plan.steps)


def _moments(optimiser: torch.optim.Optimizer, latent: Latent) -> tuple[Moments, Moments]:
    numbers, scales = ({key: optimiser.state[x][key] for key in MOMENTS} for x in latent.trained)
    return numbers, scales


def rate_share(step: int, steps: int) -> float:
    """The rate of a step, as a share of the highest: it rises over the first steps, and falls to nothing."""
    return min(1.0, (step + 1) / WARMING) * 0.5 * (1 + math.cos(math.pi * step / steps))


def needed_bytes(bundle: Bundle, shapes: Mapping[str, tuple[int, ...]], bf16: bool) -> int:
    """What a training takes in memory, about; ``bf16``: with products in bf16."""
    images_at_once = min(BATCH, max(1, POSITIONS_AT_ONCE // (2 * bundle.n_tokens)))
    positions = 2 * images_at_once * bundle.n_tokens
    m = bundle.model
    # Activations that gradients need, of one position.
    layer = 40 * m["dim"] + 16 * m["ffn_dim"] + 5 * m["n_heads"] * bundle.n_tokens
    layers = int(m["n_layers"] * layer * (BF16_SHARE if bf16 else 1))
    numbers = sum(k * n for k, n in shapes.values())
    each = NUMBER_BYTES + (4 if images_at_once < BATCH else 0)  # gradients of the images before
    return FIXED_BYTES + each * numbers + positions * (LOGIT_BYTES * bundle.vocab_size + layers)


def check_memory(bundle: Bundle, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
    """Raise CalibrationError where a training takes more memory than there is."""
    needed = needed_bytes(bundle, shapes, bf16_is_fast(device))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is not None and needed > free:
        raise CalibrationError(
            f"--refine: a training of {sum(k * n for k, n in shapes.values()) / 1e6:.0f} million codes takes about "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; leave --refine out, keep more matrices "
            "with --keep, or run it where there is more"
        )
