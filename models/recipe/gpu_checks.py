"""What ``gpu.py`` checks before anything starts: time on a GPU is too dear to learn of a wrong option in its middle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from pack import unpacked_labels

from par_model.checkpoint import open_checkpoint, par_config, vq_config
from par_model.config import PARConfig, VQConfig
from par_model.training import tokenizer as tokenizer_training
from par_model.training import transformer as transformer_training
from par_model.training.classes import other_class
from par_model.training.cli import numbers, parsed, words
from par_model.training.cli import tokenizer as tokenizer_cli
from par_model.training.cli import transformer as transformer_cli
from par_model.training.cli.numbers import Limit
from par_model.training.device import choose_device
from par_model.training.files import RUN_FILES, InputError, folder_for, followed, keep_inputs, same
from par_model.training.raw import read_meta

LIMITS = {
    "minutes": Limit(0, 1000, above=True, below=True),
    "share_tokenizer": Limit(0, 1),
    "share_model": Limit(0, 1),
    "share_siblings": Limit(0, 1),
    "start_seconds": Limit(0, 3600),
    "grace_seconds": Limit(0, 3600),
}
#: Options of the trainers that gpu.py sets itself, with values that stand for its own.
TOKENIZER_OWN = "--data ? --val ? --run ?"
MODEL_OWN = "--codes ? --val ? --tokenizer ? --run ? --group-size 4"
OWN = ("data", "val", "run", "resume", "minutes", "device")


def check(
    args: argparse.Namespace, tokenizer: str, model: str, results: Sequence[str], ns: Sequence[int]
) -> torch.device:
    """The device to train on. Raises InputError, CheckpointError, OSError for what would fail or lose something later.

    ``tokenizer``, ``model``: the options that the trainers get before those on the command line; ``results``: the names
    of the files in ``--out``; ``ns``: the n of the models that are trained.
    """
    numbers.check(args, LIMITS)
    shares = (args.share_tokenizer, args.share_model, args.share_siblings)
    if sum(shares) > 1:
        raise InputError(f"shares of the time {shares}: expected numbers from 0 to 1, together at most 1")
    device = choose_device(args.device)
    check_folders(args, results, ns)
    size, classes = check_data(args.data)
    vq = check_tokenizer(args, tokenizer)
    if size % vq.downsampling:
        raise InputError(f"--data {args.data}: images of {size} pixels; expected a multiple of {vq.downsampling}")
    check_models(args, model, vq, size // vq.downsampling, classes, ns)
    return device


def check_folders(args: argparse.Namespace, results: Sequence[str], ns: Sequence[int]) -> None:
    """Raise InputError where a result would replace an input, or be mixed with it."""
    for option, file in (("--tokenizer", args.tokenizer), ("--model", args.model)):
        if file is not None and not file.exists():
            raise InputError(f"{option} {file}: no such file; expected weights, as an earlier try left them")
    given = {"data": args.data, "tokenizer": args.tokenizer, "model": args.model}
    skipped = {"tokenizer.pt": args.tokenizer, "model-n4.pt": args.model}
    folder_for("--out", args.out)
    keep_inputs(f"--out {args.out}", (args.out / name for name in results if skipped.get(name) is None), **given)
    if args.work is None:
        return
    folder_for("--work", args.work)
    if same(args.out, args.work) or followed(args.out).is_relative_to(followed(args.work)):
        raise InputError(f"--out {args.out} is in --work {args.work}; give another folder for the results")
    parts = [name.removesuffix(".pt") for name in results if name.endswith(".pt") and skipped.get(name) is None]
    files = [args.work / part / name for part in parts for name in RUN_FILES]
    files += [args.work / part / name for part in ("train", "val") for name in ("images.u8", "labels.u8", "meta.json")]
    keep_inputs(f"--work {args.work}", [*files, args.work / "train.npz", args.work / "val.npz"], **given)


def check_data(data: Path) -> tuple[int, list[str]]:
    """Pixels of a side, and the names of the classes, of the packed images in ``data``. Raises InputError, OSError."""
    metas = []
    for name in ("train", "val"):
        if not (data / name).is_dir():
            raise InputError(f"--data {data}: has no folder {name}; expected the folder that pack.py wrote")
        metas.append(read_meta(data / name, "count", "size", names="styles"))
        for label in sorted(set(unpacked_labels(data / name, metas[-1]).tolist())):
            if not (data / name / f"{label:03}.xz").is_file():
                raise InputError(f"{data / name}: has no {label:03}.xz; take the whole folder here again")
    for key in ("size", "styles"):
        if metas[0][key] != metas[1][key]:
            raise InputError(f"--data {data}: {key} in train/meta.json and val/meta.json differ; pack both again")
    return metas[0]["size"], metas[0]["styles"]


def check_tokenizer(args: argparse.Namespace, before: str) -> VQConfig:
    """The tokenizer that is given, or will be trained. Raises InputError, CheckpointError, OSError."""
    option = "--tokenizer-options"
    more = words(option, args.tokenizer_options)
    options = parsed(option, tokenizer_cli.parser(), [*TOKENIZER_OWN.split(), *before.split(), *more])
    _refuse_own(option, options, parsed(option, tokenizer_cli.parser(), TOKENIZER_OWN.split()))
    if args.tokenizer is not None:
        return vq_config(open_checkpoint(args.tokenizer))
    start = options.encoder_for or options.init
    if start is not None:
        return vq_config(open_checkpoint(start))
    try:
        return tokenizer_training.config_of(options)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def check_models(
    args: argparse.Namespace, before: str, vq: VQConfig, side: int, classes: Sequence[str], ns: Sequence[int]
) -> None:
    """Raise InputError, CheckpointError or OSError where a model cannot be trained on side x side codes."""
    option = "--model-options"
    more = words(option, args.model_options)
    options = parsed(option, transformer_cli.parser(), [*MODEL_OWN.split(), *before.split(), *more])
    _refuse_own(option, options, parsed(option, transformer_cli.parser(), [*MODEL_OWN.split(), "--vocab", "2"]))
    if vq.codebook_size > options.vocab:
        raise InputError(
            f"the tokenizer has {vq.codebook_size} codes, {option} has --vocab {options.vocab}; give it --vocab "
            f"{vq.codebook_size}"
        )
    config = None
    for n in ns:
        options.group_size = n
        try:
            config = transformer_training.config_of(options, (1, side, side), len(classes))
        except InputError as error:
            raise InputError(f"{option}, for n = {n}: {error}") from error
    for name, file in (("--model", args.model), (f"{option}: --init", options.init)):
        if file is not None and config is not None:
            checkpoint = open_checkpoint(file)
            _check_given(name, file, par_config(checkpoint), config)
            if name == "--model" and (why := other_class(checkpoint.class_names, classes)) is not None:  # a sibling
                raise InputError(f"{name} {file}: {why} as in --data {args.data}; give a model of these classes")


def _check_given(option: str, file: Path, given: PARConfig, config: PARConfig) -> None:
    for name in ("dim", "n_layers", "n_heads", "vocab_size", "n_classes", "grid"):
        if getattr(given, name) != getattr(config, name):
            raise InputError(
                f"{option} {file}: has {name} {getattr(given, name)}, the models that begin with it "
                f"{getattr(config, name)}; give another model, or --model-options as it was trained with"
            )


def _refuse_own(option: str, options: argparse.Namespace, own: argparse.Namespace) -> None:
    for name in (*OWN, *(("codes", "tokenizer", "group_size") if "vocab" in options else ())):
        if getattr(options, name, None) != getattr(own, name, None):
            raise InputError(f"{option}: has --{name.replace('_', '-')}, which gpu.py sets itself; leave it out")
