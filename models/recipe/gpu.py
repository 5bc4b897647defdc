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
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from pack import unpack  # noqa: E402

from par_model.training.device import choose_device  # noqa: E402
from par_model.training.files import InputError, written_beside  # noqa: E402

#: What a part is trained with; options on the command line come behind these, and win.
TOKENIZER = "--steps 1000000 --batch 128 --lr 1.5e-3 --structure 2 --report 1000"
MODEL = (
    "--vocab 1024 --steps 1000000 --batch 256 --size tiny --optimizer muon --schedule cosine --lr 3e-3 --dropout 0 "
    "--ema 0.998 --report 500 --sheet 1000000 --guidance 1.5"
)
SIBLINGS = (1, 16)
LEAST_SECONDS = 2.0  #: of a part whose time was used up by the parts before it
CODES = "encode"


@dataclass
class Part:
    """A process of the whole: a training, or the encoding of a set of images."""

    name: str
    command: list[str]
    seconds: float  #: for the training itself
    run: Path | None = None  #: its run folder
    began: float = field(default_factory=time.monotonic)
    code: int | None = None


class Work:
    """The folders, the clock, and the parts that were run."""

    def __init__(self, args: argparse.Namespace, work: Path, device: torch.device) -> None:
        self.args, self.work, self.out, self.device = args, work, args.out, device
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.sheets: list[Path] = []
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("")

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def until(self, share: float) -> float:
        """Seconds of training for a part that begins now and ends when ``share`` of the whole time is over."""
        return max(share * 60 * self.args.minutes - self.seconds - self.args.start_seconds, LEAST_SECONDS)

    def say(self, text: str) -> None:
        """Print a line, and put it into the log."""
        line = f"[{self.seconds:5.0f} s] {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def verb(self, module: str, *options: str | Path) -> list[str]:
        """The command of a verb of ``parvis``, without an installation."""
        command = [sys.executable, "-m", f"par_model.training.cli.{module}", *map(str, options)]
        return [*command, "--device", self.args.device]

    def training(self, name: str, module: str, seconds: float, *options: str | Path) -> Part:
        """A part that trains."""
        run = self.work / name
        command = self.verb(module, *options, "--run", run, "--resume", "--minutes", str(seconds / 60))
        return Part(name, command, seconds, run)

    def run(self, parts: Sequence[Part]) -> None:
        """Run ``parts`` beside each other, and wait. One that does not end in its time is told to, then made to."""
        for part in parts:
            self.say(f"{part.name}: {part.seconds:.0f} s: {shlex.join(part.command[2:])}")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path}
        logs = [(self.work / f"{part.name}.txt").open("w+", encoding="utf-8") for part in parts]
        running = [
            subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            for part, log in zip(parts, logs, strict=True)
        ]
        for part, process, log in zip(parts, running, logs, strict=True):
            ends = part.began + self.args.start_seconds + part.seconds + self.args.grace_seconds
            part.code = _ended(process, ends)
            log.seek(0)
            text = log.read()
            log.close()
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write("".join(f"{part.name}: {line}\n" for line in text.splitlines()))
            if part.code != 0:
                last = text.strip().splitlines()[-1:] or ["it printed nothing"]
                self.say(f"{part.name}: FAILED with code {part.code}: {last[0]}")

    def collect(self, part: Part, halves: bool) -> Path | None:
        """Put what a training made into the folder of results: the weights, the row of the table, the last sheet.

        Returns the checkpoint, or None where there is none. One that was stopped leaves its last report's.
        """
        assert part.run is not None
        names = [name for name in ("model.pt", "checkpoint.pt") if (part.run / name).is_file()]
        ended = "FAILED" if not names else "in time" if names[0] == "model.pt" else "too late"
        row: dict[str, Any] = {"part": part.name, "ended": ended}
        if (part.run / "log.jsonl").is_file():
            row |= json.loads((part.run / "log.jsonl").read_text().splitlines()[-1])
        self.rows.append(row)
        sheets = sorted(part.run.glob("sheet*.png"))
        if sheets:
            self.sheets.append(sheets[-1])
            stack(self.sheets, self.out / "sheets.png")
        if not names:
            self.write_table()
            return None
        file = self.out / f"{part.name}.pt"
        row["mb"] = shipped(part.run / names[0], file, halves)
        self.write_table()
        self.say(f"{part.name}: {file.name}, {row['mb']:.1f} MB")
        return file

    def write_table(self) -> None:
        """The rows so far, as JSON."""
        with written_beside(self.out / "results.json") as temporary:
            temporary.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def _ended(process: subprocess.Popen[bytes], ends: float) -> int:
    """The exit code of ``process``; at the time ``ends`` it gets SIGTERM, at which a training saves, then SIGKILL."""
    for stop in (process.terminate, process.kill):
        try:
            return process.wait(max(ends - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            stop()
            ends = time.monotonic() + 10
    return process.wait()


def shipped(checkpoint: Path, file: Path, halves: bool) -> float:
    """Write the averaged weights of ``checkpoint`` to ``file``, as ``parvis export`` takes them; returns its MB."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {key: content[key] for key in ("model", "config", "class_names") if key in content}
    if halves:
        kept["model"] = {key: tensor.half() for key, tensor in kept["model"].items()}
    with written_beside(file) as temporary:
        torch.save(kept, temporary)
    return file.stat().st_size / 1e6


def stack(sheets: Sequence[Path], out: Path) -> None:
    """Put the pictures ``sheets`` below each other."""
    pictures = [Image.open(sheet).convert("RGB") for sheet in sheets]
    high = sum(picture.height for picture in pictures) + 8 * (len(pictures) - 1)
    whole = Image.new("RGB", (max(picture.width for picture in pictures), high), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + 8
    with written_beside(out) as temporary:
        whole.save(temporary, "png")


def train(work: Work) -> None:
    """All parts, one after the other. Raises InputError, OSError, ValueError where nothing can be trained."""
    args = work.args
    train_images, val_images = work.work / "train", work.work / "val"
    counts = [unpack(args.data / name, work.work / name) for name in ("train", "val")]
    work.say(f"{counts[0]} images for the training, {counts[1]} for validation")
    share = args.share_tokenizer
    tokenizer: Path | None = args.tokenizer
    if tokenizer is None:
        options = [*TOKENIZER.split(), *shlex.split(args.tokenizer_options)]
        part = work.training(
            "tokenizer", "tokenizer", work.until(share), "--data", train_images, "--val", val_images, *options
        )
        work.run([part])
        tokenizer = work.collect(part, halves=False)
        if tokenizer is None:
            return
    codes = {name: work.work / f"{name}.npz" for name in ("train", "val")}
    encoding = [
        Part(f"{CODES}-{name}", work.verb(CODES, "--data", work.work / name, *_encode(tokenizer, codes[name])), 60)
        for name in ("train", "val")
    ]
    work.run(encoding)
    if not all(file.is_file() for file in codes.values()):
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
    base += [*(["--compile"] if compiled else []), *shlex.split(args.model_options)]
    share += args.share_model
    model: Path | None = args.model
    if model is None:
        part = work.training("model-n4", "transformer", work.until(share), *base, "--group-size", "4")
        work.run([part])
        model = work.collect(part, halves=True)
    share += args.share_siblings
    base += ["--init", model] if model is not None else []
    seconds = work.until(share)
    parts = [work.training(f"model-n{n}", "transformer", seconds, *base, "--group-size", str(n)) for n in SIBLINGS]
    work.run(parts)
    for part in parts:
        work.collect(part, halves=True)


def _encode(tokenizer: Path, out: Path) -> list[str | Path]:
    return ["--tokenizer", tokenizer, "--out", out, "--batch", "512"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of the parts as text."""
    columns = ("part", "ended", "step", "images", "seconds", "psnr_db", "low_contrast_kept", "loss", "held_out", "mb")
    cells = [[str(row.get(column, ""))[:10] for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *cells]
    )


def parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    p = argparse.ArgumentParser(description="Train the demo models on one GPU, in minutes.")
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
    """The command line of this script; returns the exit code: 0, 1 where a part failed, 2 for what it cannot use."""
    args = parser().parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="parvis-gpu-"))
    try:
        for option, file in (("--tokenizer", args.tokenizer), ("--model", args.model)):
            if file is not None and not file.is_file():
                raise InputError(f"{option} {file}: no such file")
        if not 0 < args.minutes < 1000:
            raise InputError(f"--minutes {args.minutes}: expected a number above 0")
        shares = (args.share_tokenizer, args.share_model, args.share_siblings)
        if min(shares) < 0 or not sum(shares) <= 1:
            raise InputError(f"shares of the time {shares}: expected numbers from 0 to 1, together at most 1")
        device = choose_device(args.device)
        all_of_it = Work(args, work, device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        all_of_it.say(f"PyTorch {torch.__version__} on {name}, {args.minutes:g} minutes")
        train(all_of_it)
    except (InputError, OSError, ValueError) as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    all_of_it.write_table()
    print(table(all_of_it.rows))
    all_of_it.say("done")
    return 1 if any(row["ended"] != "in time" for row in all_of_it.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
