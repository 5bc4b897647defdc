"""Train the demo models on one GPU, in minutes: the tokenizer, the n = 4 model, then n = 1 and n = 16 from it.

    python gpu.py --data ../../build/demo/pack --out ../../build/demo/gpu --minutes 9

``--data`` is a folder of ``pack.py``. It needs PyTorch, numpy, Pillow and tqdm, no installation of this repository and
no network. Each part takes its share of the time, and ends its schedule of learning rates with it, on a GPU of any
speed; what a part has made is in ``--out`` before the next one begins, and a part that fails takes only its own time:

    tokenizer.pt, model-n4.pt, model-n1.pt, model-n16.pt    weights, for parvis export (models in halves: 15 MB each)
    val.npz         the held-out images as codes, for the reports of parvis calibrate
    sheets.png      reconstructions below their originals, then 48 images of each model
    results.json    the table that is printed last
    log.txt         everything that the parts printed

Eight files, 53 MB. A second try can begin with what the first one made: --tokenizer FILE, --model FILE.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from gpu_checks import check  # noqa: E402
from gpu_parts import Part, Stop, StoppedError, Work, table  # noqa: E402
from pack import unpack  # noqa: E402

from par_model.checkpoint import CheckpointError  # noqa: E402
from par_model.system import explain  # noqa: E402
from par_model.training.cli import Parser, words  # noqa: E402
from par_model.training.files import InputError, alone_in, same, text_of, written_beside  # noqa: E402
from par_model.words import printable  # noqa: E402

#: What a part is trained with; options on the command line come behind these, and win.
TOKENIZER = "--steps 1000000 --batch 128 --lr 1.5e-3 --structure 2 --report 1000"
MODEL = (
    "--vocab 1024 --steps 1000000 --batch 256 --size tiny --optimizer muon --schedule cosine --lr 3e-3 --dropout 0 "
    "--ema 0.998 --report 500 --sheet 1000000 --guidance 1.5"
)
SIBLINGS = (1, 16)
CODES = "encode"
#: What is in --out at the end.
RESULTS = (
    *("tokenizer.pt", "model-n4.pt", *(f"model-n{n}.pt" for n in SIBLINGS)),
    *("val.npz", "sheets.png", "results.json", "log.txt"),
)


def train(work: Work, counts: Sequence[int]) -> None:
    """All parts, one after the other, with so many images for training and validation.

    Raises InputError, OSError, StoppedError.
    """
    args = work.args
    train_images, val_images = work.work / "train", work.work / "val"
    work.say(f"{counts[0]} images for the training, {counts[1]} for validation")
    share = args.share_tokenizer
    tokenizer: Path | None = args.tokenizer
    if tokenizer is None:
        options = [*TOKENIZER.split(), *words("--tokenizer-options", args.tokenizer_options)]
        part = work.training(
            "tokenizer", "tokenizer", work.until(share), "--data", train_images, "--val", val_images, *options
        )
        work.run([part])
        tokenizer = work.collect(part, halves=False)
        work.stop.check()
        if tokenizer is None:
            return
    codes = {name: work.work / f"{name}.npz" for name in ("train", "val")}
    encoding = [
        Part(f"{CODES}-{name}", work.verb(CODES, "--data", work.work / name, *_encode(tokenizer, codes[name])), 60)
        for name in ("train", "val")
    ]
    work.run(encoding)
    work.stop.check()
    if any(part.code != 0 for part in encoding):
        work.rows.append({"part": CODES, "ended": "FAILED"})
        return
    with (
        np.load(codes["val"]) as arrays,
        written_beside(args.out / "val.npz") as temporary,
        temporary.open("wb") as file,
    ):
        np.savez_compressed(file, **arrays)
    base = ["--codes", codes["train"], "--val", codes["val"], "--tokenizer", tokenizer, *MODEL.split()]
    compiled = args.compile if args.compile is not None else work.device.type == "cuda"
    base += [*(["--compile"] if compiled else []), *words("--model-options", args.model_options)]
    share += args.share_model
    model: Path | None = args.model
    if model is None:
        part = work.training("model-n4", "transformer", work.until(share), *base, "--group-size", "4")
        work.run([part])
        model = work.collect(part, halves=True)
        work.stop.check()
    share += args.share_siblings
    base += ["--init", model] if model is not None else []
    seconds = work.until(share)
    parts = [work.training(f"model-n{n}", "transformer", seconds, *base, "--group-size", str(n)) for n in SIBLINGS]
    work.run(parts)
    for part in parts:
        work.collect(part, halves=True)


def _encode(tokenizer: Path, out: Path) -> list[str | Path]:
    return ["--tokenizer", tokenizer, "--out", out, "--batch", "512"]


def parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    p = Parser(description="Train the demo models on one GPU, in minutes.")
    p.add_argument("--data", type=Path, required=True, help="folder that pack.py wrote")
    p.add_argument("--out", type=Path, required=True, help="folder for the results")
    p.add_argument("--minutes", type=float, default=9.0, help="for all of it (default 9)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="train the models with torch.compile (default: on a GPU)",
    )
    p.add_argument(
        "--work",
        type=Path,
        help="folder for what is not a result; trainings that were cut off there go on (default: a temporary one)",
    )
    p.add_argument("--tokenizer", type=Path, help="train none: take this one, of an earlier try")
    p.add_argument("--model", type=Path, help="train no n = 4 model: begin the others with this one")
    p.add_argument("--share-tokenizer", type=float, default=0.36, help="of the time, to its end (default 0.36)")
    p.add_argument("--share-model", type=float, default=0.42, help="of the time, with the encoding (default 0.42)")
    p.add_argument("--share-siblings", type=float, default=0.19, help="of the time, for both at once (default 0.19)")
    p.add_argument("--tokenizer-options", default="", help="more of parvis train-tokenizer, in one text")
    p.add_argument("--model-options", default="", help="more of parvis train, in one text, for all three models")
    p.add_argument(
        "--start-seconds",
        type=float,
        default=14.0,
        help="that a part takes beside its training: to start, to report and to save at its end (default 14)",
    )
    p.add_argument("--grace-seconds", type=float, default=10.0, help="after which a late part is stopped (default 10)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code.

    0; 1 where a part failed; 2 for what it cannot use; 130 or 143 where Ctrl-C or SIGTERM stopped it.
    """
    args = parser().parse_args(argv)
    work: Path | None = None
    began = time.monotonic()
    with Stop() as stop, ExitStack() as held:
        try:
            device = check(args, TOKENIZER, MODEL, RESULTS, (*(() if args.model else (4,)), *SIBLINGS))
            stop.check()
            work = args.work or Path(tempfile.mkdtemp(prefix="parvis-gpu-"))
            for option, folder in (("--out", args.out), ("--work", work)):
                held.enter_context(alone_in(option, folder))
            # First, so that a pack that is damaged moves nothing away.
            counts = [unpack(args.data / name, work / name, stop.check) for name in ("train", "val")]
            moved = set_aside(args.out, [args.tokenizer, args.model, *in_options(args)])
            all_of_it = Work(args, work, device, stop, began)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
            all_of_it.say(f"PyTorch {torch.__version__} on {name}, {args.minutes:g} minutes")
            if moved is not None:
                all_of_it.say(f"what an earlier try left in {args.out} is in {moved}")
            with suppress(StoppedError):
                train(all_of_it, counts)
            all_of_it.write_table()
            print(table(all_of_it.rows))
            if stop.signal is None:
                all_of_it.say("done")
                return 1 if any(row["ended"] != "in time" for row in all_of_it.rows) else 0
            all_of_it.say(f"stopped by {signal.Signals(stop.signal).name}; what was made until then is in {args.out}")
        except StoppedError:
            print("gpu.py: stopped before anything was trained", file=sys.stderr)
        except (InputError, CheckpointError, OSError) as error:
            text = explain(error) if isinstance(error, OSError) else text_of(error)
            print(f"gpu.py: error: {printable(text)}", file=sys.stderr)
            return 2
        finally:
            if args.work is None and work is not None:
                shutil.rmtree(work, ignore_errors=True)
        assert stop.signal is not None
        return 128 + stop.signal


def in_options(args: argparse.Namespace) -> list[Path]:
    """Files that the options of the trainers name, such as those of ``--init``."""
    options = (("--tokenizer-options", args.tokenizer_options), ("--model-options", args.model_options))
    return [Path(word.rpartition("=")[2]) for option, text in options for word in words(option, text)]


def set_aside(out: Path, given: Sequence[Path | None]) -> Path | None:
    """Move the results of an earlier try in ``out`` to a folder there, so that what is beside each other is of one try.

    Those that are ``given`` to this one stay. Returns the folder; None where there was nothing to move.
    """
    kept = [path for path in given if path is not None]
    old = [out / name for name in RESULTS if (out / name).exists()]
    old = [file for file in old if not any(same(file, path) for path in kept)]
    if not old:
        return None
    number = next(n for n in itertools.count(1) if not (out / f"earlier-{n}").exists())
    folder = out / f"earlier-{number}"
    folder.mkdir()
    for file in old:
        file.rename(folder / file.name)
    return folder


if __name__ == "__main__":
    sys.exit(main())
