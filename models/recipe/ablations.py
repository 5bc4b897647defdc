"""What each part of the method is worth: small models that differ in one of them and were trained alike.

    python ablations.py ../demo --models n4/model.pt raster/model.pt --held-out val --train train --out table.jsonl

Of each model of ``parvis train``, the first one is what the others are compared with:

``nats``    cross entropy per token of held-out images that no training has seen, by the model's own calls: tokens that
            are drawn at once do not see each other, so what a call cannot know of them is in this number. ``change``
            is from the first model, image by image, with its 95 % interval; ``first`` are the nats of the first n
            tokens, which the method draws one by one.
``distance``  of generated images from held-out ones, and ``spread``, how much images of a class differ, as
            ``parvis evaluate`` has both (docs/evaluation.md).

Images are made by ``par_model``, in which every ablation runs; an export refuses causal groups.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from heldout import EACH, add_folders, read_unseen
from numpy.typing import NDArray
from script import run

from par_calibration.errors import CalibrationError
from par_calibration.evaluate.distances import LEAST
from par_calibration.evaluate.images import Labels, Sets
from par_calibration.evaluate.sheet import write_rows
from par_calibration.pictures import Pixels
from par_calibration.report.frechet import Double
from par_calibration.report.measures import interval
from par_model.checkpoint import CheckpointError, open_checkpoint, par_config
from par_model.generation import generate
from par_model.ordering import phases, token_order
from par_model.training.classes import other_class
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, keep_inputs, written_beside
from par_model.transformer import PAR
from par_runtime.bench.report.text import aligned
from par_runtime.bundle import Bundle
from par_runtime.dtypes import Int
from par_runtime.errors import BundleError, RequestError
from par_runtime.images.png import check_sheet
from par_runtime.request import Settings
from par_runtime.system import check_different, check_writable
from par_runtime.tokenizer import Tokenizer

AT_ONCE = 48  #: images
LIMITS = {
    "each": EACH,
    "generated": Limit(2, 10**6),
    "shown": Limit(1, 100),
    "seed": Limit(0, 2**31 - 1),
    "guidance": Limit(0, 1000),
    "top_p": Limit(0, 1, above=True),
}


@dataclass(frozen=True)
class Row:
    """A model of the table."""

    name: str
    n: int
    order: str
    sequential_initial: bool
    causal_groups: bool
    calls: int  #: per image
    images: int  #: held-out ones
    nats: float
    change: float | None  #: of nats from the first model, with its 95 % interval
    low: float | None
    high: float | None
    first: float  #: nats per token of the first n tokens


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", type=Path, help="bundle whose tokenizer gave the codes that the models were trained on")
    p.add_argument(
        "--models", type=Path, nargs="+", required=True, help="model.pt of parvis train; its folder names it"
    )
    add_folders(p, each=40)
    p.add_argument("--generated", type=int, default=40, help="images of each class that a model makes (default 40)")
    p.add_argument("--guidance", type=float, default=1.5, help="of generated images (default 1.5)")
    p.add_argument("--top-p", type=float, default=0.8, help="of generated images (default 0.8)")
    p.add_argument("--seed", type=int, default=0, help="of the first image (default 0)")
    p.add_argument("--out", type=Path, required=True, help="JSON lines to write, one for each model")
    p.add_argument("--sheet", type=Path, help="PNG to write: a row for each model, from the same seeds")
    p.add_argument("--shown", type=int, default=12, help="images of a row of the sheet (default 12)")
    args = p.parse_args(argv)
    return run("ablations.py", lambda: work(args), BundleError, RequestError, CheckpointError, CalibrationError)


def work(args: argparse.Namespace) -> int:
    """Measure every model and write the table. Raises what :func:`main` catches."""
    numbers.check(args, LIMITS)
    outputs = [path for path in (args.out, args.sheet) if path is not None]
    check_different(outputs)
    for output in outputs:
        option = "--out" if output is args.out else "--sheet"
        keep_inputs(f"{option} {output}", [output], bundle=args.bundle, held_out=args.held_out, train=args.train)
        for model in args.models:
            keep_inputs(f"{option} {output}", [output], models=model)
        check_writable(output)
    bundle = Bundle.open(args.bundle)
    images, labels = read_unseen(args, bundle)
    if bundle.image_size is None or "encoder" not in bundle.graphs:
        raise InputError(f"{args.bundle}: has no encoder, whose features are compared; give a bundle that has one")
    if min(len(images), args.generated * bundle.n_classes) < LEAST:
        raise InputError(
            f"{len(images)} held-out images and --generated {args.generated} of {bundle.n_classes} classes: a distance "
            f"takes {LEAST} images of both; give more"
        )
    models = [(path.resolve().parent.name, opened(path, bundle)) for path in args.models]
    if args.sheet is not None:
        check_sheet((1 + len(models)) * args.shown, args.shown, bundle.image_size)
    classes = labels.astype(np.int64)
    sets = Sets(bundle, args.shown, None)
    sets.hold_out([(images, classes)], "the pictures")
    base: Double | None = None  #: nats [M] of the first model
    rows = []
    with closing(Tokenizer(bundle)) as tokenizer:
        raster = in_raster(tokenizer.encode(images), bundle.order)
        for name, model in models:
            config = model.config
            each = nats_of(model, raster[:, token_order(config)], classes)
            nats = each.mean(1)
            change, low, high = None, None, None
            if base is None:
                base = nats
            else:
                change, (low, high) = float((nats - base).mean()), interval(nats - base, args.seed)
            settings = Settings(guidance=args.guidance, top_p=args.top_p)
            sets.add(name, generated(model, tokenizer, settings, args), settings)
            calls = sum(phase.repeat for phase in phases(config))
            ablated = (config.order, config.sequential_initial, config.causal_groups)
            mean, initial = float(nats.mean()), float(each[:, : config.group_size].mean())
            facts = (name, config.group_size, *ablated, calls, len(nats))
            rows.append(Row(*facts, mean, change, low, high, initial))
            print(f"{name}: {mean:.3f} nats per token", flush=True)
    write(args, rows, sets)
    return 0


def opened(path: Path, bundle: Bundle) -> PAR:
    """A model of ``parvis train`` for the codes of ``bundle``. Raises InputError, CheckpointError, OSError."""
    checkpoint = open_checkpoint(path)
    config = par_config(checkpoint)
    given = (config.grid, config.vocab_size, config.n_classes)
    expected = (tuple(bundle.grid), bundle.vocab_size, bundle.n_classes)
    if given != expected:
        raise InputError(
            f"{path}: has grid, codes and classes {given}; {bundle.path} has {expected}: give models for it"
        )
    if (why := other_class(checkpoint.class_names, bundle.class_names)) is not None:
        raise InputError(f"{path}: {why} as in {bundle.path}; give models that were trained on its classes")
    model = PAR(config)
    model.load_state_dict({key: checkpoint.tensor(key).float() for key in checkpoint.tensors})
    return model.eval()


def in_raster(tokens: Int, order: Sequence[int] | NDArray[np.int64]) -> Int:
    """``tokens`` [M,N] in sequence order, where place k is code ``order[k]`` of the grid, as [M,N] in raster order."""
    out = np.empty_like(tokens)
    out[:, list(order)] = tokens
    return out


@torch.no_grad()
def nats_of(model: PAR, tokens: Int, labels: Labels) -> Double:
    """The cross entropy [M,N] of ``tokens`` [M,N], in the order of ``model``."""
    out = []
    for first in range(0, len(tokens), AT_ONCE):
        some = torch.from_numpy(tokens[first : first + AT_ONCE])
        logits = model.teacher_forced(some, torch.from_numpy(labels[first : first + AT_ONCE]))
        out.append(F.cross_entropy(logits.transpose(1, 2), some, reduction="none").double())
    return torch.cat(out).numpy()


def generated(
    model: PAR, tokenizer: Tokenizer, settings: Settings, args: argparse.Namespace
) -> Iterator[tuple[Pixels, Labels]]:
    """``args.generated`` images of every class, the classes in turns, some at a time."""
    config = model.config
    labels = np.arange(args.generated * config.n_classes) % config.n_classes
    for first in range(0, len(labels), AT_ONCE):
        some = labels[first : first + AT_ONCE]
        z = generate(model, some.tolist(), guidance=settings.guidance, top_p=settings.top_p, seed=args.seed + first)
        raster = in_raster(z.numpy(), token_order(config))
        yield tokenizer.decode(raster[:, list(tokenizer.bundle.order)]), some


def write(args: argparse.Namespace, rows: Sequence[Row], sets: Sets) -> None:
    """Print the table, and write the files. Raises OSError."""
    found = sets.comparison(args.seed)
    assert found is not None  # there are enough images
    body = []
    lines = []
    for row, one in zip(rows, found.sets, strict=True):
        lines.append(json.dumps(asdict(row) | {"compared": asdict(one)}) + "\n")
        body.append(
            [
                row.name,
                str(row.calls),
                f"{row.nats:.3f}",
                "" if row.change is None else f"{row.change:+.3f} ({row.low:+.3f} .. {row.high:+.3f})",
                f"{row.first:.3f}",
                f"{one.distance:.4f} +- {one.margin:.4f}",
                "" if one.spread is None else f"{one.spread:.2f}",
            ]
        )
    print("\n".join(aligned(["model", "calls", "nats", "change", "first", "distance", "spread"], body)))
    sizes = f"{found.compared} images of each side, {found.held_out} held-out images"
    print(f"held-out images from others of them {found.chance.distance:.4f}, {sizes}")
    with written_beside(args.out) as part:
        part.write_text("".join(lines))
    if args.sheet is not None:
        write_rows(args.sheet, sets.rows)


if __name__ == "__main__":
    sys.exit(main())
