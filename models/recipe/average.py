"""The average of two checkpoints of one model, before and after it was trained further.

    python average.py BEFORE/model.pt AFTER/model.pt --share 0.5 --out ../../build/demo/averaged.pt --val val.npz

A training that begins with good weights, at a full learning rate, moves to others that draw about as well. For the
demo, those half way between were better than both, as they often are (Wortsman et al. 2021,
https://arxiv.org/abs/2109.01903). ``--share`` is that of the second one. ``--val`` says how likely
the average finds held-out images, as ``parvis train`` says it of its model; shares of 0 and 1 say it of the two.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from script import run
from torch import Tensor

from par_model.checkpoint import Checkpoint, CheckpointError, open_checkpoint, par_config
from par_model.config import PARConfig
from par_model.training.classes import other_class
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, keep_inputs, same
from par_model.training.run import save
from par_model.training.transformer import EVAL_IMAGES, grid_of, held_out_loss, load_codes
from par_model.transformer import PAR
from par_model.words import printable
from par_runtime.errors import RequestError
from par_runtime.system import check_writable

LIMITS = {"share": Limit(0, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description="Average two checkpoints of one model.")
    p.add_argument("first", type=Path, help="checkpoint, of parvis train or from_bundle.py")
    p.add_argument("second", type=Path, help="another one of the same sizes")
    p.add_argument("--share", type=float, default=0.5, help="of the second one (default 0.5)")
    p.add_argument("--out", type=Path, required=True, help="checkpoint to write, in fp32")
    p.add_argument("--val", type=Path, metavar="CODES", help="held-out codes.npz: print the loss of the average")
    args = p.parse_args(argv)

    def work() -> int:
        numbers.check(args, LIMITS)
        said = average(args.first, args.second, args.share, args.out, args.val)
        print(printable(f"{args.out}: {1 - args.share:g} of {args.first}, {args.share:g} of {args.second}{said}"))
        return 0

    return run("average.py", work, CheckpointError, RequestError)


def average(first: Path, second: Path, share: float, out: Path, val: Path | None) -> str:
    """Write the average of two checkpoints to ``out``; returns what it has for the images of ``val``, in words.

    Raises InputError, CheckpointError, RequestError, OSError.
    """
    for path in (first, second):
        if same(out, path):
            raise InputError(f"--out {out}: is {path}, which it is made of; give another name")
    keep_inputs(f"--out {out}", [out], val=val)
    check_writable(out)
    a, b = opened(first), opened(second)
    config = par_config(b)
    if par_config(a) != config or set(a.tensors) != set(b.tensors):
        raise InputError(f"{second}: is of another model than {first}; give two checkpoints of one, of the same n")
    names = a.class_names or b.class_names
    if (why := other_class(b.class_names, names)) is not None:
        raise InputError(f"{second}: {why} as in {first}; give two checkpoints of one model")
    if names is not None and len(names) != config.n_classes:
        raise InputError(
            f"{first}: has {len(names)} class names for {config.n_classes} classes; give whole checkpoints"
        )
    model = {key: torch.lerp(a.tensor(key).float(), b.tensor(key).float(), share) for key in b.tensors}
    for key, tensor in model.items():
        if not tensor.isfinite().all():
            of = first if not a.tensor(key).float().isfinite().all() else second
            raise InputError(
                f"{of}: {key} holds NaN or infinity, or too large numbers; give a checkpoint that is whole"
            )
    content: dict[str, Any] = {"model": model, "config": asdict(config) | {"kind": "par"}}
    if names is not None:
        content["class_names"] = names
    said = "" if val is None else f": {held_out(config, model, val, names):.3f} nats per token of {val}"
    save(out, content)
    return said


def opened(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, one that says its sizes. Raises InputError, CheckpointError, OSError."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.config:
        raise InputError(f"{path}: has no 'config'; expected a checkpoint of parvis train or from_bundle.py")
    return checkpoint


def held_out(config: PARConfig, state: Mapping[str, Tensor], val: Path, classes: Sequence[str] | None = None) -> float:
    """Nats per token of the first held-out images, as many as a training takes. Raises InputError, OSError.

    ``classes``: names of the model's classes, which those of ``val`` must be.
    """
    codes, labels, names = load_codes(val, config.vocab_size)
    grid = grid_of(codes)
    if grid != config.grid or len(names) != config.n_classes:
        raise InputError(
            f"--val {val}: has grid {grid} and {len(names)} classes, the model {config.grid} and {config.n_classes}; "
            "give the codes that it was trained beside"
        )
    if (why := other_class(names, classes)) is not None:
        raise InputError(f"--val {val}: {why} as in the model; give the codes that it was trained beside")
    model = PAR(config).eval()
    model.load_state_dict(state)
    return held_out_loss(model, codes[:EVAL_IMAGES], labels[:EVAL_IMAGES], batch=32)


if __name__ == "__main__":
    sys.exit(main())
