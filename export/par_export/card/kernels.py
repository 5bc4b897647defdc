"""Every kernel of an engine against a reference in float64, on the GPU, launch by launch; then all of them in one go.

What is launched by itself waits for everything before it. So whoever gives other bits when all launches follow each
other, as they do in production, does not wait where it must.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from par_export.card import decoder_reference, step_reference
from par_export.card.images import SETTINGS
from par_export.card.lines import Emit
from par_export.card.stand import TYPES, Outcome, Stand, View
from par_export.card.subject import middle_call, programs
from par_runtime.backends.kernels.modules import Prepared
from par_runtime.pipeline import Pipeline
from par_runtime.schedule import Schedule

REFERENCES = step_reference.REFERENCES | decoder_reference.REFERENCES
AGAIN = 10  #: runs of all launches in one go
#: What every program leaves: tensors by program.
RESULTS = {"step": ("logits", "tokens"), "decoder": ("images",)}


def check_kernels(spec: Mapping[str, Any], emit: Emit) -> None:
    """All kernels of the bundle ``path``, whose checks begin with ``name``, on the GPU ``device``.

    ``torch``: where PyTorch computes references.
    """
    emit("begin", name=f"{spec['name']}: loads")
    pipeline = Pipeline.load(Path(spec["path"]), spec["device"], selftest=False)
    stand = Stand(pipeline, spec["torch"])
    for images in stand.backend.engine.images[::-1]:  # the largest first: memory stays where it is then
        _check_batch(stand, images, spec["name"], emit)
    pipeline.close()


def _check_batch(stand: Stand, images: int, name: str, emit: Emit, calls: Sequence[int] | None = None) -> None:
    """All programs for batches of ``images``: ``calls`` of an image (default: the last, the middle and the first one),
    and the decoder.
    """
    pipeline, bundle = stand.pipeline, stand.pipeline.bundle
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(images)]
    labels = [i % bundle.n_classes for i in range(images)]
    pipeline.generate(labels, settings, seeds=list(range(images)), max_batch=images)
    schedule = Schedule.of(bundle, labels, settings, list(range(images)))
    # From the last one on: each leaves NaN behind the keys that it sees, which an earlier call does not see either.
    chosen = sorted({bundle.calls - 1, middle_call(bundle), 0} if calls is None else calls, reverse=True)
    for call in chosen:
        contexts = stand.backend.at_call(schedule.batch, schedule.class_ids, schedule.noise, call)
        for program in programs(pipeline):
            if program == "step" or call == chosen[0]:
                where = f"batch {images}" + (f", call {call}" if program == "step" else "")
                prepared = contexts[program].launches  # type: ignore[attr-defined]
                _check_program(stand, program, images, prepared, f"{name}: {{}} ({where})", emit)


def _check_program(stand: Stand, program: str, images: int, prepared: Prepared, name: str, emit: Emit) -> None:
    """Every launch of a program by itself, then all in one go. ``name`` has a place for the kernel's."""
    _poison(stand, program, images, prepared)
    found: dict[str, list[Outcome]] = defaultdict(list)

    def begin(view: View) -> None:
        emit("begin", name=name.format(view.source))

    def each(view: View, outcomes: list[Outcome]) -> None:
        found[view.source] += outcomes

    stand.walk(program, images, prepared, REFERENCES, each, begin)
    for source, outcomes in found.items():
        worst = max(outcomes, key=lambda one: (not one.passed, one.error / one.allowed))
        fields = {"passed": all(one.passed for one in outcomes), "error": worst.error, "allowed": worst.allowed}
        emit("check", name=name.format(source), text=f"{worst.parameter}: {worst.text}", **fields)
    in_one_go = name.format(f"{program} in one go")
    emit("begin", name=in_one_go)
    alone = _results(stand, program, images, prepared)
    with stand.backend.stream.capture() as captured:
        prepared.enqueue()
    different = 0
    with captured.graph as graph:
        for again in range(AGAIN):
            launch = partial(graph.launch, stand.backend.stream) if again % 2 else prepared.enqueue
            launch()
            stand.backend.stream.synchronize()
            together = _results(stand, program, images, prepared)
            different += any(not torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    text = f"{different} of {AGAIN} runs gave other bits than launches that wait for each other"
    emit("check", name=in_one_go, passed=not different, text=text)
    left = _counters(stand, program)
    emit("check", name=name.format(f"{program}'s counters"), passed=not left, text=f"{left} are not zero afterwards")


def _poison(stand: Stand, program: str, images: int, prepared: Prepared) -> None:
    """NaN in all scratch memory, and in all keys that no row sees."""
    backend, of = stand.backend, programs(stand.pipeline)[program].program
    for name, (_, size) in of.profiles[images].scratch.items():
        backend.stream.fill(prepared.address(name), 0xFF, size)
    backend.stream.synchronize()
    if program != "step":
        return
    cache, rows = stand.pipeline.bundle.cache, 2 * images
    shape = (rows, cache.heads, stand.pipeline.bundle.n_tokens, cache.head_dim)
    length = stand.read(prepared.address("length"), torch.int32, (rows,)).tolist()
    for name in cache.inputs:
        keys = stand.read(prepared.address(name), _cache_type(stand), shape)
        for row, visible in enumerate(length):
            keys[row, :, visible:] = float("nan")
        stand.write(prepared.address(name), keys)


def _cache_type(stand: Stand) -> torch.dtype:
    return TYPES[f"*{stand.backend.engine.precision}"]


def _results(stand: Stand, program: str, images: int, prepared: Prepared) -> list[torch.Tensor]:
    """What the program has left, as bytes."""
    bundle = stand.pipeline.bundle
    height, width = bundle.image_size or (0, 0)
    query = programs(stand.pipeline)[program].program.query
    sizes = {
        "logits": images * query * bundle.vocab_size * 4,
        "tokens": 2 * images * query * 8,
        "images": images * height * width * 3,
    }
    return [stand.read(prepared.address(name), torch.uint8, (sizes[name],)) for name in RESULTS[program]]


def _counters(stand: Stand, program: str) -> int:
    """How many bytes of the program's state are not zero."""
    loaded = programs(stand.pipeline)[program]
    size = loaded.program.state_bytes
    if not size:
        return 0
    return int((stand.read(loaded.shared.states[program], torch.uint8, (size,)) != 0).sum())
