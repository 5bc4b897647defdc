"""The self-test of a bundle: its greedy test image, made on a backend, has the tokens of the export."""

from __future__ import annotations

import time

import numpy as np

from par_runtime.backends.base import Backend
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule, rows_of

#: A self-test ends after this time, so a large model on a slow machine makes only the beginning of its test image.
SELFTEST_SECONDS = 5.0
LOAD_SECONDS = 1.0  #: the same of a self-test in ``Pipeline.load``, which stands between a command and its first image


class SelftestError(BundleError):
    """The self-test could not pass; what a backend raises while it runs is none."""


def check_selftest(bundle: Bundle, backend: Backend, seconds: float) -> None:
    """See ``Pipeline.selftest``. Raises BundleError."""
    test = bundle.selftest
    if not test["labels"]:
        raise SelftestError(f"{bundle.path}: holds random weights, for benchmarks, and no self-test")
    label, guidance = test["labels"][0], test["guidance"]
    wanted = np.array(test["tokens"][:1], np.int64)
    greedy = image_settings(bundle, 1, guidance=guidance, greedy=True, guidance_interval=-1)
    schedule = Schedule.of(bundle, [label], greedy)  # no seeds: the draws are zero
    noise = schedule.noise
    until = time.perf_counter() + seconds
    tokens, done = np.zeros_like(wanted), 0
    phases_run: set[str] = set()
    with rows_of(backend, schedule):
        for call, batch, ids, write in schedule.walk(tokens):
            if time.perf_counter() > until and len(phases_run) == len(bundle.phases):
                break
            tokens[:, call.positions] = backend.step(batch, ids, write, noise[:, call.positions])
            done = call.positions.stop
            phases_run.add(call.phase.name)
    if (tokens[:, :done] == wanted[:, :done]).all():
        return
    with rows_of(backend, schedule):
        # Teacher-forced: each call is fed the export's tokens.
        for call, batch, ids, write in schedule.walk(wanted):
            drawn = backend.step(batch, ids, write, noise[:, call.positions])[0]
            logits = backend.logits(batch, ids, write)[0]  # [q,V]
            slots, best = np.arange(call.query), logits.max(-1)
            # The token drawn here and the export's must both have the largest logit, up to rounding. The comparison is
            # ~(gap <= ...), because a NaN must count as wrong.
            code = np.clip(drawn, 0, bundle.vocab_size - 1)
            gap = best - np.minimum(logits[slots, wanted[0, call.positions]], logits[slots, code])
            # Equal logits of all codes come from a backend that computes nothing, not from a model.
            wrong = ~(gap <= backend.tie * np.abs(logits).max()) | (best <= logits.min(-1)) | (drawn != code)
            if wrong.any():
                slot = int(wrong.argmax())
                position = call.write + slot
                raise SelftestError(
                    f"{bundle.path}: self-test failed on {backend.info.name}: label {label} gives token "
                    f"{drawn[slot]} at position {position}, at export it was {wanted[0, position]} (their logits "
                    f"differ by {gap[slot]:.3g}). Copy the bundle again or export it again"
                )
            if call.positions.stop >= done:
                break
