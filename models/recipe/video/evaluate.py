"""How good the clips of the small video models are, beside real ones: distances of features, and how steady they are.

The features are those of a small network that this script trains on real clips: a part that sees one frame, trained to
name the garment, and a part that sees what the frames give over time, trained to name the garment and its motion. They
are not those of the published FVD (I3D, trained on human actions): nothing here may be compared with figures of other
papers, only with the rows of the same table.

``frames``   Frechet distance of the features of single frames (32 numbers)
``clips``    Frechet distance of the features of whole clips (32 numbers)
``class``    share of clips whose garment the classifier names as asked for
``steady``   share of clips whose motion and brightness are within what 99 % of real clips show behind the tokenizer:
             the largest second difference of the garment's centre, and the spread of the sum over its frames
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from script import run

from par_calibration.report.frechet import distance
from par_model.system import naming
from par_model.training.classes import other_class
from par_model.training.cli import Parser, numbers
from par_model.training.cli.numbers import Limit
from par_model.training.clips import ClipFolder
from par_model.training.files import InputError, keep_inputs, regular, written_beside
from par_model.training.run import batch_index, save
from par_runtime import Pipeline
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.system import check_different, check_writable

FEATURES, STEPS, BATCH = 32, 2500, 32


class Classifier(nn.Module):
    """Features of frames and of clips, and what they are trained for."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
        self.frame = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.SiLU())
        self.time = nn.Sequential(
            nn.Conv1d(FEATURES, 64, 3, padding=1), nn.SiLU(), nn.Conv1d(64, FEATURES, 3, padding=1), nn.SiLU()
        )
        self.frame_class = nn.Linear(FEATURES, n_classes)
        self.clip_class = nn.Linear(FEATURES, n_classes)
        self.motion = nn.Linear(FEATURES, 2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the frames [B,T,32] and of the clips [B,32] of ``clips`` [B,T,H,W] in [0,1]."""
        frames = self.frame(clips.flatten(0, 1)[:, None]).unflatten(0, clips.shape[:2])
        return frames, self.time(frames.transpose(1, 2)).mean(2)


def classifier(path: Path, folder: Path, data: ClipFolder) -> Classifier:
    """The network at ``path``; trained on ``data``, of ``folder``, where it is not there yet.

    Raises InputError, OSError.
    """
    torch.manual_seed(0)
    model = Classifier(len(data.class_names))
    if path.exists():
        try:
            model.load_state_dict(torch.load(regular(path), weights_only=True))
        except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, KeyError) as error:
            raise InputError(
                f"--classifier {path}: is not the classifier of such clips; remove it, or give another name"
            ) from error
        return model.eval()
    with naming(folder / "motion.f32"):
        motion = torch.from_numpy(np.fromfile(regular(folder / "motion.f32"), np.float32))
    if len(motion) != 2 * len(data):
        raise InputError(f"{folder / 'motion.f32'}: has {len(motion)} numbers for {len(data)} clips; make them again")
    motion = motion.view(-1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        index = batch_index(0, step, BATCH, len(data))
        labels = torch.from_numpy(data.labels[index].astype(np.int64))
        frames, clips = model(data.batch(index)[:, 0])
        loss = (
            F.cross_entropy(model.frame_class(frames).flatten(0, 1), labels.repeat_interleave(data.frames))
            + F.cross_entropy(model.clip_class(clips), labels)
            + F.mse_loss(model.motion(clips), motion[index])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(path, model.state_dict())
    return model.eval()


@torch.no_grad()
def features(model: Classifier, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of every frame [M*T,32] and of the clips [M,32], and the classes [M] of ``clips`` uint8 [M,T,H,W]."""
    frames, whole, named = [], [], []
    for i in range(0, len(clips), 100):
        per_frame, per_clip = model(torch.tensor(clips[i : i + 100]).float() / 255)
        frames.append(per_frame.flatten(0, 1).double().numpy())
        whole.append(per_clip.double().numpy())
        named.append(model.clip_class(per_clip).argmax(1).numpy())
    return np.concatenate(frames), np.concatenate(whole), np.concatenate(named)


def unrest(clips: np.ndarray) -> np.ndarray:
    """[M,2] of ``clips`` uint8 [M,T,H,W]: the largest second difference of the garment's centre in pixels, and the
    spread of the sum of its pixels over the frames, relative to their mean."""
    x = clips.astype(np.float64)
    mass = x.sum((2, 3)) + 1e-9
    rows = (x.sum(3) * np.arange(x.shape[2])).sum(2) / mass
    columns = (x.sum(2) * np.arange(x.shape[3])).sum(2) / mass
    turn = np.hypot(np.diff(rows, 2, axis=1), np.diff(columns, 2, axis=1)).max(1)
    return np.stack([turn, mass.std(1) / mass.mean(1)], 1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this script; returns the exit code."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", type=Path, required=True, help="raw clips that the classifier is trained on")
    p.add_argument("--val", type=Path, required=True, help="raw clips that everything is compared with")
    p.add_argument("--classifier", type=Path, required=True, help="its weights; trained where the file is missing")
    p.add_argument("--bundle", type=Path, nargs="+", required=True, help="bundles whose clips are judged")
    p.add_argument("--count", type=int, default=1000, help="clips of each bundle, as many of each class")
    p.add_argument("--seed", type=int, default=0, help="of the first clip (default 0)")
    p.add_argument("--json", type=Path, help="file for the rows of the table")
    args = p.parse_args(argv)
    return run("evaluate.py", lambda: evaluate(args), BundleError, RequestError)


def evaluate(args: argparse.Namespace) -> int:
    """Print a table with a row for each bundle; with ``--json`` write the rows too. Returns the exit code.

    Raises InputError, BundleError, RequestError, OSError.
    """
    data, held_out = ClipFolder.open(args.train), ClipFolder.open(args.val)
    check(args, data, held_out)
    torch.set_num_threads(1)
    model = classifier(args.classifier, args.train, data)
    real = np.ascontiguousarray(held_out.clips[: args.count, ..., 0])
    frames, whole, _ = features(model, real)
    with Pipeline.load(args.bundle[0]) as pipeline:  # what the tokenizer alone loses
        again = pipeline.decode(pipeline.encode(real[..., None].repeat(3, axis=-1))).mean(-1).round().astype(np.uint8)
    bounds = np.quantile(unrest(again), 0.99, axis=0)
    rows = []

    def judge(name: str, clips: np.ndarray, labels: np.ndarray, more: dict[str, object]) -> None:
        per_frame, per_clip, named = features(model, clips)
        steady = (unrest(clips) <= bounds).all(1).mean()
        row = {
            "name": name,
            "clips_judged": len(clips),
            **more,
            "frames": distance(frames, per_frame),
            "clips": distance(whole, per_clip),
            "class": float((named == labels).mean()),
            "steady": float(steady),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)

    train = np.ascontiguousarray(data.clips[: args.count, ..., 0])
    judge("real clips of the training", train, data.labels[: args.count], {})
    judge("held-out clips through the tokenizer", again, held_out.labels[: args.count], {})
    for path in args.bundle:
        with Pipeline.load(path) as pipeline:
            labels = np.arange(args.count) % pipeline.bundle.n_classes
            made = pipeline.generate(labels.tolist(), seed=args.seed)
            assert made.images is not None
            grey = made.images.mean(-1).round().astype(np.uint8)
            more = {"n": pipeline.bundle.group_size, "calls": pipeline.bundle.calls}
            judge(pipeline.bundle.name, grey, labels, more)
    if args.json:
        with written_beside(args.json) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def check(args: argparse.Namespace, data: ClipFolder, held_out: ClipFolder) -> None:
    """Raise an error for what cannot be compared, before anything is trained.

    Raises InputError, BundleError, RequestError, OSError.
    """
    most = min(len(data), len(held_out))
    numbers.check(args, {"count": Limit(2 * len(data.class_names), most), "seed": Limit(0, 2**31 - 1)})
    sizes = (data.frames, data.size, len(data.class_names))
    if data.clips.shape[-1] != 1 or (held_out.frames, held_out.size, len(held_out.class_names)) != sizes:
        raise InputError(
            f"--val {args.val}: is not of the grey clips and classes of --train {args.train}; give its own"
        )
    if (why := other_class(held_out.class_names, data.class_names)) is not None:
        raise InputError(f"--val {args.val}: {why} as in --train {args.train}; give its own")
    for path in args.bundle:
        bundle = Bundle.open(path)
        made = (bundle.frames, *(bundle.image_size or ()), bundle.n_classes) if bundle.video else "no clips"
        if made != (sizes[0], sizes[1], *sizes[1:]):
            raise InputError(
                f"{path}: makes {made}; expected frames, pixels and classes {(sizes[0], sizes[1], *sizes[1:])}, of "
                f"--train {args.train}: give a bundle of clips like these"
            )
        if (why := other_class(bundle.class_names, data.class_names)) is not None:
            raise InputError(f"{path}: {why} as in --train {args.train}; give a bundle of clips like these")
    check_different([path for path in (args.classifier, args.json) if path is not None])
    for option, output in (("--classifier", args.classifier), ("--json", args.json)):
        if output is not None:
            keep_inputs(f"{option} {output}", [output], train=args.train, val=args.val)
            check_writable(output)


if __name__ == "__main__":
    sys.exit(main())
