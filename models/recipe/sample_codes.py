"""Let a bundle make images and write their codes, from which an encoder learns which codes that model writes.

    python sample_codes.py ../demo --count 768 --out ../../build/demo/sampled.npz

Guidance 1, no top-k and no top-p: the model's own distribution, which is that of the codes it was trained on. Writes
codes uint16 [count, h, w] in raster order and labels, as ``parvis encode`` does.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from par_runtime import Pipeline
from par_runtime.bundle import BundleError

BATCH = 48


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Write the codes of images that a bundle makes.")
    p.add_argument("bundle", type=Path, help="folder that parvis export wrote")
    p.add_argument("--out", type=Path, required=True, help="codes.npz to write")
    p.add_argument("--count", type=int, default=768, help="images, the classes in turn")
    p.add_argument("--seed", type=int, default=0, help="of the first image")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    args = p.parse_args(argv)
    try:
        pipeline = Pipeline.load(args.bundle, device="cpu", threads=args.threads)
        labels = np.arange(args.count) % pipeline.bundle.n_classes
        codes = []
        for start in range(0, args.count, BATCH):
            these = [int(label) for label in labels[start : start + BATCH]]
            result = pipeline.generate(
                these, seed=args.seed + start, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, decode=False
            )
            codes.append(pipeline.grid_tokens(result.tokens).astype(np.uint16))
            print(f"{start + len(these)} of {args.count} images", file=sys.stderr, flush=True)
        part = args.out.with_suffix(".part.npz")
        np.savez(part, codes=np.concatenate(codes), labels=labels.astype(np.uint8))
        os.replace(part, args.out)
    except (BundleError, OSError) as error:
        print(f"sample_codes.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
