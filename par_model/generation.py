"""Reference generation: slow and simple. Every fast implementation is tested against it.

Four phases, each a function: prefill, sequential, transition, group (paper, section 3.2).
Guidance, temperature, top-k, top-p and the draw follow the order of operations of the published code.

Letters: B images, R rows (2B when guided), N tokens, n tokens per group, q positions of one call, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from par_model.ordering import phases
from par_model.transformer import PAR, KVCache, check_labels

MIN_TEMPERATURE = 1e-5


@torch.no_grad()
def generate(
    model: PAR,
    labels: Tensor | Sequence[int],
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    greedy: bool = False,
    guidance_interval: int = -1,
) -> Tensor:
    """Generate tokens [B,N] int64, in sequence order, for ``labels`` [B].

    ``guidance`` > 1 runs every image twice, with its class and without. ``top_k`` 0 and ``top_p`` 1
    keep the whole codebook. The seed of image i is ``seed + i``, or ``seed[i]``; its noise depends on
    that number alone. ``greedy`` takes the most probable token and ignores the sampling settings.
    Raises ValueError for a value out of range.

    ``guidance_interval`` is ``cfg_interval`` of the published sampler: a call is guided while its index is at most
    this number, and takes the logits of the class alone afterwards; -1 guides every call. The prefill has no index
    and is always guided. The published sampler then has two loops, and each counts from 0: one over the sequential
    calls, and one over the groups. The transition makes the first group, so it is call 0 of the second loop **(ours:
    nothing public says where it counts; at n = 1, where no sequential calls are, it makes the indices LlamaGen's)**.
    """
    config = model.config
    device = model.tok_embeddings.weight.device
    labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
    check_labels(labels, config.n_classes)
    seeds = (
        [int(seed) + i for i in range(len(labels))] if isinstance(seed, (int, np.integer)) else [int(s) for s in seed]
    )
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds for {len(labels)} labels; give one seed per label, or one number")
    if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}; expected >= 0, >= 0 and 0..1")
    if guidance_interval < -1:
        raise ValueError(f"guidance_interval={guidance_interval}; expected -1 (every call is guided) or more")
    noise = (
        torch.from_numpy(np.stack([uniforms(s, config.n_tokens) for s in seeds])).to(device)
        if seeds
        else torch.zeros(0, config.n_tokens)
    )

    index = -1  # of the next call: the prefill has none

    def choose(logits: Tensor, start: int) -> Tensor:
        if guidance > 1:
            cond, uncond = logits.chunk(2)
            within = guidance_interval == -1 or index <= guidance_interval
            logits = uncond + (cond - uncond) * guidance if within else cond
        if greedy:
            return logits.argmax(-1)
        return sample(logits, noise[:, start : start + logits.shape[1]], temperature, top_k, top_p)

    rows = torch.cat([labels, torch.full_like(labels, config.n_classes)]) if guidance > 1 else labels
    state = State(model, rows, choose, len(labels))
    run = {"prefill": prefill, "sequential": sequential, "transition": transition, "group": group}
    for phase in phases(config):
        if phase.name == "transition":
            index = 0
        for i in range(phase.repeat):
            run[phase.name](state, phase.start + i * phase.query)
            index += 1
    return state.tokens


class Choose(Protocol):
    """A function from the logits [R,q,V] of input positions ``start`` .. ``start + q - 1`` to their tokens [B,q]."""

    def __call__(self, logits: Tensor, start: int) -> Tensor: ...


@dataclass
class State:
    """One batch that is being generated: the labels of its rows [R], its tokens so far [B,k], a cache per layer."""

    model: PAR
    labels: Tensor
    choose: Choose
    batch: int

    def __post_init__(self) -> None:
        weight = self.model.tok_embeddings.weight
        self.tokens = torch.zeros(self.batch, 0, dtype=torch.int64, device=weight.device)
        config = self.model.config
        self.caches = [KVCache(len(self.labels), config, weight.dtype, weight.device) for _ in range(config.n_layers)]


def prefill(state: State, start: int = 0) -> None:
    """Feed the class embedding; the call makes z[0]."""
    _step(state, start, 1)


def sequential(state: State, start: int) -> None:
    """Feed one initial token; the call makes the next."""
    _step(state, start, 1)


def transition(state: State, start: int) -> None:
    """Feed the last initial token and the n-1 learnable tokens; the call makes the first parallel group."""
    _step(state, start, state.model.config.group_size)


def group(state: State, start: int) -> None:
    """Feed the previous group; the call makes the next, one token in each region."""
    _step(state, start, state.model.config.group_size)


def _step(state: State, start: int, query: int) -> None:
    model = state.model
    positions = torch.arange(start, start + query, device=state.tokens.device)
    visible = model.visible[positions]  # [q]; all equal, except with causal_groups
    keys = torch.arange(int(visible.max()), device=positions.device)
    repeat = len(state.labels) // max(state.batch, 1)
    x = model.embed(state.tokens.repeat(repeat, 1), state.labels, positions)
    x = model.blocks(x, positions, keys[None, :] < visible[:, None], state.caches)
    state.tokens = torch.cat([state.tokens, state.choose(model.head(x), start)], dim=1)


def cumulative(x: Tensor) -> Tensor:
    """The sums of ``x`` [...,V] along its last dimension up to each place: [...,V]."""
    return x.cumsum(-1)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    sums: Callable[[Tensor], Tensor] = cumulative,
) -> Tensor:
    """Draw tokens [B,q] from ``logits`` [B,q,V] fp32 with ``uniform`` [B,q] in [0,1): inverse CDF.

    Temperature, then top-k (ties with the k-th are kept), then top-p (the first token over the threshold is kept;
    equal logits are counted in order of id), then softmax. ``sums`` computes what :func:`cumulative` does.
    """
    logits = logits / max(temperature, MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ranked.softmax(-1)
        before = sums(probabilities) - probabilities
        drop = before > top_p
        drop[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    cdf = sums(logits.softmax(-1))
    target = uniform[..., None] * cdf[..., -1:]
    return (cdf <= target).sum(-1).clamp(max=logits.shape[-1] - 1)


def uniforms(seed: int, n_tokens: int) -> np.ndarray:
    """One number in [0,1) per token: [N] float32, the top 24 bits of Philox4x64-10 keyed by ``seed``.

    The generator is counter-based, so the noise of an image does not depend on its batch, the order of work or the
    backend. The runtime makes the same numbers; both are tested against ``tests/golden/noise.json``. Raises
    ValueError.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}; expected 0 .. 2**64-1")
    raw = np.random.Philox(key=seed).random_raw(n_tokens)
    return ((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).astype(np.float32)
