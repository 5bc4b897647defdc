"""``parvis export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from par_export.bundle import ExportError, Request, export
from par_export.gate.model import ParityError
from par_export.staging import TargetError
from par_model.checkpoint import CheckpointError, hub


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        export(
            Request(
                checkpoint=hub.local(args.checkpoint, say),
                tokenizer=None if args.tokenizer == "none" else hub.local(args.tokenizer, say),
                out=args.out,
                precision=args.precision,
                heads=args.heads,
                grid=args.grid,
                sampling=args.sampling,
                name=args.name,
                class_names=None if args.class_names == Path("none") else _class_names(args.class_names),
                imagenet_names=args.class_names is None,
                encoder=not args.no_encoder,
                defaults={
                    k: v for k in ("guidance", "temperature", "top_k", "top_p") if (v := getattr(args, k)) is not None
                },
                force=args.force,
            ),
            say=say,
        )
    except (TargetError, CheckpointError, OSError) as error:
        print(f"parvis: error: {_describe(error, args.out)}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"parvis: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("parvis: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _describe(error: Exception, out: Path) -> str:
    if isinstance(error, PermissionError):
        return f"no permission to write {error.filename or out}; give an --out in a folder you can write to"
    if isinstance(error, OSError) and error.errno == 28:
        return f"no space left on the disk of {out}; free some or give another --out (nothing was left behind)"
    return str(error)


def _class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        names = (
            json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise ExportError(
            f"{path}: cannot be read ({error}); expected UTF-8, a JSON list or one name per line"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"{path}: expected a JSON list of names, or one name per line")
    return names


def grid(text: str) -> tuple[int, int, int]:
    """``24`` is 24x24; ``16x32`` is height x width; ``5x16x16`` is frames x height x width."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected L, HxW or TxHxW, for instance 24 or 5x16x16")
    if len(sizes) == 1:
        return (1, sizes[0], sizes[0])
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else (1, sizes[0], sizes[1])


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="parvis export",
        description="Turn a PAR or LlamaGen checkpoint into a bundle: ONNX graphs, weights and a manifest, "
        "checked against PyTorch before it is published.",
    )
    p.add_argument(
        "--checkpoint",
        required=True,
        help="PAR or LlamaGen weights: .pt, .safetensors, an index of shards or the folder that holds it, or "
        "hf://OWNER/REPOSITORY/FILE@REVISION",
    )
    p.add_argument(
        "--tokenizer",
        required=True,
        help="VQ tokenizer weights, in the same forms, or 'none' for a bundle that ends at tokens",
    )
    p.add_argument("--out", type=Path, required=True, help="bundle folder to write; must not exist (or --force)")
    p.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="of the stored weights and the static graphs (default: fp32)",
    )
    p.add_argument("--heads", type=int, help="attention heads (default: what the file says, or the named size's)")
    p.add_argument(
        "--grid",
        type=grid,
        help="tokens: L, HxW or TxHxW (default: what the file says, or 24, which is 384 px, for the named sizes)",
    )
    p.add_argument(
        "--sampling",
        choices=["plain", "topk", "exact"],
        default="topk",
        help="sampling tail of the static graphs: 'plain' draws from the whole codebook (or greedily); 'topk' adds top-k up to "
        "3840 and top-p within it (default); 'exact' has no limit and costs more, and plans are built with topk instead. step.onnx is always exact",
    )
    p.add_argument("--name", help="name in the manifest (default: the folder's)")
    p.add_argument(
        "--class-names",
        type=Path,
        help="JSON list, or a text file with one name per line; 'none' for no names (default: those of the "
        "checkpoint, or ImageNet's for a model of its shape)",
    )
    p.add_argument(
        "--no-encoder",
        action="store_true",
        help="leave out the tokenizer's encoder, which 'parvis reconstruct' and 'parvis edit' of a photo need",
    )
    p.add_argument("--guidance", type=float, help="default guidance scale of the bundle")
    p.add_argument("--temperature", type=float, help="default temperature")
    p.add_argument("--top-k", type=int, help="default top-k")
    p.add_argument("--top-p", type=float, help="default top-p")
    p.add_argument("--force", action="store_true", help="replace the bundle at --out")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
