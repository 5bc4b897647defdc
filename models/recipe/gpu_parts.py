"""The parts of ``gpu.py``: processes that have a time, and end in order when the whole is told to stop."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image, ImageDraw

from par_model.training.files import written_beside
from par_model.training.run import save

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 2.0  #: of a part whose time was used up by the parts before it
LATE_SECONDS = 10.0  #: after which a part that was told to stop for its time is ended
STOP_SECONDS = 20.0  #: the same when the whole was told to stop
CAPTION = 12  #: pixels above each sheet


class StoppedError(Exception):
    """The whole was told to stop, by Ctrl-C, SIGTERM or the end of its terminal."""


class Stop:
    """A context in which these signals are passed on to the parts that run; the whole then ends between two steps."""

    def __init__(self) -> None:
        self.signal: int | None = None  #: the first one that came
        self.came = 0.0
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Stop:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.came = number, time.monotonic()
        self.pass_on()

    def pass_on(self) -> None:
        """Tell every part that runs to save and end."""
        for process in self.running:
            process.terminate()

    @property
    def wanted(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def check(self) -> None:
        """Raise StoppedError where a signal came."""
        if self.wanted:
            raise StoppedError


@dataclass
class Part:
    """A process of the whole: a training, or the encoding of a set of images."""

    name: str
    command: list[str]
    seconds: float  #: for the training itself
    run: Path | None = None  #: its run folder
    began: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)  #: by the clock that files have
    code: int | None = None


class Work:
    """The folders, the clock, and the parts that were run."""

    def __init__(
        self,
        args: argparse.Namespace,
        work: Path,
        device: torch.device,
        stop: Stop | None = None,
        began: float | None = None,
    ) -> None:
        self.args, self.work, self.out, self.device = args, work, args.out, device
        self.stop = stop or Stop()
        self.began = time.monotonic() if began is None else began
        self.rows: list[dict[str, Any]] = []
        self.sheets: list[tuple[str, Path]] = []  #: caption and file
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
        running = self.stop.running
        try:
            for part, log in zip(parts, logs, strict=True):  # in sessions of their own: Ctrl-C comes from here alone
                running.append(
                    subprocess.Popen(
                        part.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                    )
                )
            if self.stop.wanted:  # it came while they started
                self.stop.pass_on()
            for part, process in zip(parts, running, strict=True):
                part.code = self._ended(process, part)
        finally:
            for process in running:
                if process.poll() is None:  # an error here: nothing goes on without us
                    process.kill()
                    process.wait()
            running.clear()
        for part, log in zip(parts, logs, strict=True):
            log.seek(0)
            text = log.read()
            log.close()
            with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                file.write("".join(f"{part.name}: {line}\n" for line in text.splitlines()))
            if part.code != 0:
                last = text.strip().splitlines()[-1:] or ["it printed nothing"]
                self.say(f"{part.name}: FAILED with code {part.code}: {last[0]}")

    def _ended(self, process: subprocess.Popen[bytes], part: Part) -> int:
        """The exit code of ``process``. When its time is over it gets SIGTERM, to save, then SIGKILL."""
        ends = part.began + self.args.start_seconds + part.seconds + self.args.grace_seconds
        told = False
        while True:
            if self.stop.wanted and not told:  # it was passed on
                told, ends = True, min(ends, self.stop.came) + STOP_SECONDS
            try:
                return process.wait(min(max(ends - time.monotonic(), 0.05), 0.5))
            except subprocess.TimeoutExpired:
                if time.monotonic() < ends:
                    continue
            if told:
                process.kill()
                return process.wait()
            process.terminate()
            told, ends = True, time.monotonic() + LATE_SECONDS

    def collect(self, part: Part, halves: bool) -> Path | None:
        """Put what a training made into the folder of results: the weights, the row of the table, the last sheet.

        Returns the checkpoint, or None where there is none. One that was stopped leaves its last report's.
        """
        assert part.run is not None
        names = [name for name in ("model.pt", "checkpoint.pt") if self._made(part, part.run / name)]
        late, failed = ("stopped", "stopped") if self.stop.wanted else ("too late", "FAILED")
        ended = failed if not names or (part.code or 0) > 0 else "in time" if names[0] == "model.pt" else late
        row: dict[str, Any] = {"part": part.name, "ended": ended}
        if (part.run / "log.jsonl").is_file():
            row |= last_row(part.run / "log.jsonl")
        self.rows.append(row)
        sheets = sorted(part.run.glob("sheet*.png"))
        if sheets:
            what = "originals, and below each its reconstruction" if part.name == "tokenizer" else "images from codes"
            self.sheets.append((f"{part.name}: {what}", sheets[-1]))
            stack(self.sheets, self.out / "sheets.png")
        if not names:
            self.write_table()
            return None
        file = self.out / f"{part.name}.pt"
        row["mb"] = shipped(part.run / names[0], file, halves)
        self.write_table()
        self.say(f"{part.name}: {file.name}, {row['mb']:.1f} MB")
        return file

    def _made(self, part: Part, file: Path) -> bool:
        """Whether ``part`` made ``file``: one that failed may have found it there, of an earlier try."""
        return file.is_file() and ((part.code or 0) <= 0 or file.stat().st_mtime >= part.began_at)

    def write_table(self) -> None:
        """The rows so far, as JSON."""
        with written_beside(self.out / "results.json") as temporary:
            temporary.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def last_row(log: Path) -> dict[str, Any]:
    """The last whole row of the log of a training; a kill may have cut the last one off, or left none."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}


def shipped(checkpoint: Path, file: Path, halves: bool) -> float:
    """Write the averaged weights of ``checkpoint`` to ``file``, as ``parvis export`` takes them; returns its MB."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    kept = {key: content[key] for key in ("model", "config", "class_names") if key in content}
    if halves:
        kept["model"] = {key: tensor.half() for key, tensor in kept["model"].items()}
    save(file, kept)
    return file.stat().st_size / 1e6


def stack(sheets: Sequence[tuple[str, Path]], out: Path) -> None:
    """Put the pictures ``sheets`` below each other, each under its caption."""
    pictures = [(caption, Image.open(sheet).convert("RGB")) for caption, sheet in sheets]
    high = sum(CAPTION + picture.height for _, picture in pictures) + 8 * (len(pictures) - 1)
    whole = Image.new("RGB", (max(picture.width for _, picture in pictures), high), "white")
    top = 0
    for caption, picture in pictures:
        ImageDraw.Draw(whole).text((2, top), caption, fill="black")
        whole.paste(picture, (0, top + CAPTION))
        top += CAPTION + picture.height + 8
    with written_beside(out) as temporary:
        whole.save(temporary, "png")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of the parts as text."""
    columns = ("part", "ended", "step", "images", "seconds", "psnr_db", "low_contrast_kept", "loss", "held_out", "mb")
    cells = [[str(row.get(column, ""))[:10] for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *cells]
    )
