"""The average of two checkpoints of one model, before and after it was trained further.

    python average.py BEFORE/model.pt AFTER/model.pt --share 0.5 --out ../../build/demo/averaged.pt

A training that begins with good weights, at a full learning rate, moves to others that draw about as well. For the
demo, those half way between were better than both, as they often are (Wortsman et al. 2021,
https://arxiv.org/abs/2109.01903). ``--share`` is that of the second one; ``parvis train`` says how likely a model finds
held-out images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from par_model.checkpoint import CheckpointError, open_checkpoint, par_config
from par_model.training.cli import numbers
from par_model.training.cli.numbers import Limit
from par_model.training.files import InputError, same, text_of, written_beside
from par_model.words import printable

LIMITS = {"share": Limit(0, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = argparse.ArgumentParser(description="Average two checkpoints of one model.")
    p.add_argument("first", type=Path, help="checkpoint, of parvis train or from_bundle.py")
    p.add_argument("second", type=Path, help="another one of the same sizes")
    p.add_argument("--share", type=float, default=0.5, help="of the second one (default 0.5)")
    p.add_argument("--out", type=Path, required=True, help="checkpoint to write, in fp32")
    args = p.parse_args(argv)
    try:
        numbers.check(args, LIMITS)
        average(args.first, args.second, args.share, args.out)
    except (InputError, CheckpointError, OSError) as error:
        print(f"average.py: error: {printable(text_of(error))}", file=sys.stderr)
        return 2
    print(f"{args.out}: {1 - args.share:g} of {args.first}, {args.share:g} of {args.second}")
    return 0


def average(first: Path, second: Path, share: float, out: Path) -> None:
    """Write the average of two checkpoints to ``out``. Raises InputError, CheckpointError, OSError."""
    for path in (first, second):
        if same(out, path):
            raise InputError(f"--out {out}: is {path}, which it is made of; give another name")
    a, b = open_checkpoint(first), open_checkpoint(second)
    config = par_config(b)
    if par_config(a) != config or set(a.tensors) != set(b.tensors):
        raise InputError(f"{second}: is of another model than {first}; give two checkpoints of one, of the same n")
    model = {key: torch.lerp(a.tensor(key).float(), b.tensor(key).float(), share) for key in b.tensors}
    content: dict[str, Any] = {"model": model, "config": asdict(config) | {"kind": "par"}}
    if b.class_names is not None:
        content["class_names"] = b.class_names
    with written_beside(out) as part:
        torch.save(content, part)


if __name__ == "__main__":
    sys.exit(main())
