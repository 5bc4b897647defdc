"""``parvis export``: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from par_export.cli.common import guarded
from par_export.errors import ExportError
from par_runtime.backends.tails import TAILS, TOPK_LIMIT
from par_runtime.checked import load_json
from par_runtime.cli import options
from par_runtime.cli.common import Parser, printable
from par_runtime.dtypes import PRECISIONS
from par_runtime.system import naming

MOST_BYTES = 2**26  #: of the names of classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``parvis export``; returns the exit code."""
    args = parser().parse_args(argv)
    from par_model.checkpoint import CheckpointError

    advice = "give an --out in a folder you can write to"
    return guarded(lambda: run(args), expected=(CheckpointError,), no_permission=advice, out=args.out)


def run(args: argparse.Namespace) -> int:
    """Export, printing what is done. Raises what :func:`par_export.bundle.export` raises."""
    from par_export.bundle import ExportRequest, export
    from par_model.checkpoint import hub

    def say(line: str) -> None:
        print(printable(line), flush=True)

    names = ("guidance", "temperature", "top_k", "top_p", "guidance_interval")
    settings = {name: getattr(args, name) for name in names}
    export(
        ExportRequest(
            checkpoint=hub.local(args.checkpoint, say),
            tokenizer=None if args.tokenizer == "none" else hub.local(args.tokenizer, say),
            out=args.out,
            precision=args.precision,
            heads=args.heads,
            grid=args.grid,
            sampling=args.sampling,
            name=args.name,
            class_names=None if args.class_names == Path("none") else _class_names(args.class_names),
            class_names_file=args.class_names,
            imagenet_names=args.class_names is None,
            encoder=not args.no_encoder,
            defaults={name: value for name, value in settings.items() if value is not None},
            force=args.force,
            weights=args.weights,
        ),
        say=say,
    )
    return 0


def _class_names(path: Path | None) -> list[str] | None:
    """The names in the file at ``path``; None for None. Raises ExportError, OSError."""
    if path is None:
        return None

    def fault(message: str) -> ExportError:
        return ExportError(f"{message}; expected UTF-8, a JSON list or one name per line")

    with naming(path), path.open("rb") as file:  # not only of a file: a shell can give a pipe
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise fault(f"{path}: has more than {MOST_BYTES} bytes")
    if path.suffix == ".json":
        names = load_json(content, str(path), fault)
    else:
        try:
            names = [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise fault(f"{path}: cannot be read ({error.reason})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(f"{path}: expected a JSON list of names, or one name per line")
    return names


def grid(text: str) -> tuple[int, int, int]:
    """A grid of tokens, for argparse: "24" is 24x24, "16x32" height x width, "5x16x16" frames x height x width."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected L, HxW or TxHxW, for instance 24 or 5x16x16")
    if len(sizes) == 1:
        return (1, sizes[0], sizes[0])
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else (1, sizes[0], sizes[1])


def parser() -> argparse.ArgumentParser:
    """The options of ``parvis export``."""
    p = Parser(
        prog="parvis export",
        description="Turn a PAR or LlamaGen checkpoint into a bundle: ONNX graphs, weights and a manifest, "
        "checked against PyTorch before it is published.",
    )
    p.add_argument(
        "--checkpoint",
        type=options.place,
        required=True,
        help="PAR or LlamaGen weights: a file of torch.save (.pt, .pth, .bin, .ckpt), .safetensors, an index of shards "
        "of either, the folder that holds one of these, or hf://OWNER/REPOSITORY/FILE@REVISION",
    )
    p.add_argument(
        "--tokenizer",
        type=options.place,
        required=True,
        help="VQ tokenizer weights, in the same forms, or 'none' for a bundle that ends at tokens",
    )
    p.add_argument(
        "--out", type=options.path, required=True, help="bundle folder to write; must not exist (or --force)"
    )
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the stored weights and the static graphs (default: fp32)",
    )
    p.add_argument(
        "--weights",
        choices=["model", "ema"],
        help="which weights of files that hold both: 'model', those that were trained, or 'ema', their average, of "
        "checkpoint and tokenizer (default, as the published code: 'model' of the checkpoint, 'ema' of the tokenizer; "
        "the export says which)",
    )
    p.add_argument(
        "--heads",
        type=int,
        help="attention heads (default: what the file says, config.json beside it, or the named size)",
    )
    p.add_argument(
        "--grid",
        type=grid,
        help="tokens: L, HxW or TxHxW (default: what the file says, config.json beside it, pixels in the file's name "
        "as in c2i_B_256.pt, or 24, which is 384 px, for the named sizes)",
    )
    p.add_argument(
        "--sampling",
        choices=TAILS,
        help="sampling tail of the static graphs: 'plain' draws from the whole codebook (or greedily); 'topk' adds "
        f"top-k up to {TOPK_LIMIT} and top-p within it; 'exact' has no limit and costs more (default: topk, or exact "
        "where the bundle's own settings need it). step.onnx is always exact",
    )
    p.add_argument(
        "--name",
        type=options.text,
        help="name in the manifest (default: that of the bundle that the checkpoint was read from, or the folder's)",
    )
    p.add_argument(
        "--class-names",
        type=options.path,
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
    p.add_argument("--guidance-interval", type=int, help="default guidance interval, -1: none (see 'parvis generate')")
    p.add_argument("--force", action="store_true", help="replace the bundle at --out")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
