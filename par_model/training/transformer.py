"""Train a PAR model on encoded images: ``parvis train``.

The defaults are the paper's recipe (section 4.1): AdamW at a constant 1e-4 per 256 images, betas (0.9, 0.95),
weight decay 0.05 on matrices, clip 1.0, dropout 0.1, class dropout 0.1, bf16 autocast over fp32 weights (fp32 on
a CPU without instructions for bf16). ``--optimizer muon --schedule cosine`` learns faster on a small budget; the demo
model was trained with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_model.checkpoint import open_checkpoint
from par_model.config import SIZES, PARConfig
from par_model.dtypes import bf16_is_fast
from par_model.generation import generate
from par_model.ordering import token_order
from par_model.system import naming
from par_model.training.classes import other_class
from par_model.training.device import (
    autocast,
    choose_device,
    load_optimizer,
    moved,
    on_cpu,
    random_state,
    restore_random_state,
)
from par_model.training.files import InputError, keep_run_inputs, regular
from par_model.training.muon import Float32Muon
from par_model.training.resume import AGAIN
from par_model.training.run import (
    EMA,
    Run,
    batch_index,
    cosine,
    load_tokenizer,
    load_video_tokenizer,
    write_sheet,
)
from par_model.transformer import PAR

CLASS_DROPOUT = 0.1  # share of the images that are trained without their class, for guidance
MUON_LR = 0.02  # learning rate of the matrices; the usual value for orthogonalised updates
EVAL_IMAGES = 512  # held-out images of a report

#: Code ids [M,h,w], or [M,t,h,w] of clips; labels [M] int64, class names.
Codes = tuple[np.ndarray, np.ndarray, list[str]]


def train(args: argparse.Namespace) -> None:
    """Run or resume the training that ``args`` of :func:`parser` describes.

    Raises InputError, CheckpointError, OSError.
    """
    keep_run_inputs(args.run, codes=args.codes, val=args.val, init=args.init, tokenizer=args.tokenizer)
    if args.muon_lr is not None and args.optimizer != "muon":
        raise InputError(
            f"--muon-lr {args.muon_lr:g}: is of Muon, and the optimizer is {args.optimizer}; give --optimizer muon, "
            "or --lr"
        )
    codes, labels, names = load_codes(args.codes, args.vocab)
    held_out = load_codes(args.val, args.vocab)
    if held_out[0].shape[1:] != codes.shape[1:]:
        raise InputError(
            f"{args.val}: codes of {grid_text(held_out[0])}, {args.codes} has {grid_text(codes)}; encode "
            "both with the same tokenizer"
        )
    if (why := other_class(held_out[2], names)) is not None:
        raise InputError(f"{args.val}: {why} as in {args.codes}; encode images of the same classes")
    config = config_of(args, grid_of(codes), len(names))
    device = choose_device(args.device)
    with Run(args.run, args.minutes) as run:
        _train(args, config, run, device, (codes, labels, names), held_out)


def grid_of(codes: np.ndarray) -> tuple[int, int, int]:
    """The token grid (T, H, W) of ``codes`` [M,h,w] or [M,t,h,w]."""
    t, h, w = (1, *codes.shape[1:])[-3:]
    return t, h, w


def grid_text(codes: np.ndarray) -> str:
    """The grid of ``codes`` for a message."""
    return "x".join(map(str, codes.shape[1:]))


def config_of(args: argparse.Namespace, grid: tuple[int, int, int], n_classes: int) -> PARConfig:
    """The model that the options ``args`` describe. Raises InputError for numbers that do not fit each other."""
    dim, n_layers, n_heads = SIZES[args.size]
    if args.dim or args.layers or args.heads:
        if not (args.dim and args.layers and args.heads):
            raise InputError("--dim, --layers and --heads go together; give all three, or --size")
        dim, n_layers, n_heads = args.dim, args.layers, args.heads
    try:
        return PARConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            vocab_size=args.vocab,
            n_classes=n_classes,
            grid=grid,
            group_size=args.group_size,
            order=args.order,
            sequential_initial=not args.parallel_initial,
            causal_groups=args.causal_groups,
            dropout=args.dropout,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _train(
    args: argparse.Namespace, config: PARConfig, run: Run, device: torch.device, data: Codes, held_out: Codes
) -> None:
    codes, labels, names = data
    torch.manual_seed(args.seed)
    model = PAR(config)
    if args.init is not None:
        start_from(model, args.init)
    model.to(device)
    if args.compile:
        compile_layers(model)
    optimizers = make_optimizers(model, args)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    ema = EMA(model, args.ema)
    step = 0
    about = asdict(config) | {"kind": "par"}
    with run.resume(args.resume, about) as state:
        if state is not None:
            was = "muon" if len(state["optimizers"]) > 1 else "adamw"
            if was != args.optimizer:
                raise InputError(
                    f"--resume: the run in {run.path} was trained with --optimizer {was}, given now: --optimizer "
                    f"{args.optimizer}; {AGAIN}"
                )
            if (why := other_class(names, state.get("class_names"))) is not None:
                raise InputError(f"--resume: of --codes {args.codes}, {why} as in the run in {run.path}; {AGAIN}")
            model.load_state_dict(state["live"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                load_optimizer(optimizer, saved)
            ema.load(state["model"])
            step = state["step"]
            restore_random_state(state["rng"], device)  # dropout is random
    sequences = sequences_of(codes, config, args.vocab).to(device)

    def save() -> None:
        final = {"model": ema.shadow, "config": about, "class_names": names}
        live = {"live": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        run.save("checkpoint.pt", on_cpu(final | live | {"step": step, "rng": random_state(device)}))
        if done:
            run.save("model.pt", on_cpu(final))

    total, counted = torch.zeros((), dtype=torch.float64, device=device), 0
    done = run.done(step, args.steps)
    while not done and not run.should_stop:
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for param_group, peak in zip(optimizer.param_groups, lrs, strict=True):
                floor = 0.0 if args.schedule == "cosine" else 1.0
                param_group["lr"] = cosine(step, args.steps, peak, args.warmup, floor, run.share)
        index = batch_index(args.seed, step, args.batch, len(sequences))
        drop = np.random.default_rng((args.seed, step)).random(len(index)) < CLASS_DROPOUT
        tokens = sequences[moved(index, device)].long()
        classes = moved(np.where(drop, config.n_classes, labels[index]), device)
        total += update(model, tokens, classes, optimizers, args.bf16)
        ema.update(model, step)
        counted, step = counted + 1, step + 1
        done = run.done(step, args.steps)
        if step % args.report == 0 or done:
            save()  # first: a log or sheet that fails must not lose the steps
            averaged = PAR(config).to(device).eval()
            averaged.load_state_dict(ema.shadow)
            held = held_out_loss(averaged, held_out[0][:EVAL_IMAGES], held_out[1][:EVAL_IMAGES], args.batch)
            run.log(step=step, images=step * args.batch, loss=float(total) / counted, held_out=held)
            total.zero_()
            counted = 0
            if args.tokenizer and (step % args.sheet == 0 or done):
                sample_sheet(averaged, args.tokenizer, run.path / f"sheet-{step:06d}.png", args.guidance)
    save()


def update(
    model: PAR, tokens: Tensor, labels: Tensor, optimizers: Sequence[torch.optim.Optimizer], bf16: bool | None
) -> Tensor:
    """One update of the weights by ``tokens`` [B,N] in sequence order and ``labels`` [B], all on the model's device.

    ``bf16``: see :func:`device.autocast`. Returns the loss, a number that stays there: nothing waits for it.
    """
    with autocast(tokens.device, bf16):
        loss = loss_of(model, tokens, labels)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def compile_layers(model: PAR) -> None:
    """Let TorchInductor fuse the kernels of a layer when it first runs. All layers share one compilation, which takes a
    part of the time of one of the whole model. Where it cannot be done (no C compiler, say), PyTorch says why, and the
    layer runs as it is.
    """
    torch._dynamo.config.suppress_errors = True
    for layer in model.layers:
        layer.compile(dynamic=False)


def sequences_of(codes: np.ndarray, config: PARConfig, vocab: int) -> Tensor:
    """``codes`` [M,h,w] or [M,t,h,w] in sequence order: [M,N], int16 where that holds every id, else int32."""
    flat = codes.reshape(len(codes), -1)[:, token_order(config)]
    return torch.from_numpy(flat.astype(np.int16 if vocab <= 2**15 else np.int32))


def start_from(model: PAR, path: Path) -> None:
    """Give ``model`` the weights of the model at ``path``, which may have another n. Learnable tokens begin anew then.

    Raises InputError where another size differs, CheckpointError, OSError.
    """
    given = dict(open_checkpoint(path).tensors)
    own = model.state_dict()
    learnable = "spe_tok_embeddings.special_embeddings.weight"
    if given.get(learnable) is None or own.get(learnable) is None or given[learnable].shape != own[learnable].shape:
        given.pop(learnable, None)
    for key, tensor in own.items():
        if key != learnable and (key not in given or given[key].shape != tensor.shape):
            raise InputError(f"--init {path}: has no {key} of shape {tuple(tensor.shape)}; give a model of this size")
    model.load_state_dict(given, strict=False)


def loss_of(model: PAR, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy (nats) over all N targets of ``tokens`` [B,N] in sequence order. Labels are not checked."""
    logits = model.teacher_forced(tokens, labels)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@torch.no_grad()
def held_out_loss(model: PAR, codes: np.ndarray, labels: np.ndarray, batch: int) -> float:
    """Mean cross entropy (nats per token) of held-out ``codes`` [M,h,w] or [M,t,h,w] with their ``labels`` [M]."""
    device, losses = model.tok_embeddings.weight.device, []
    sequences = sequences_of(codes, model.config, model.config.vocab_size)
    classes = torch.from_numpy(labels.astype(np.int64)).to(device)
    with autocast(device):
        for i in range(0, len(codes), batch):
            tokens = sequences[i : i + batch].to(device).long()
            losses.append(float(loss_of(model, tokens, classes[i : i + batch])) * len(tokens))
    return sum(losses) / len(codes)


def make_optimizers(model: PAR, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the matrices of the layers and AdamW for all other weights.

    On a GPU, AdamW updates all weights of a group in one kernel. Where bf16 is slow, Muon computes in fp32.
    """
    fused = True if model.output.weight.is_cuda else None
    lr = args.lr if args.lr else 1e-4 * args.batch / 256
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    outer = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("layers.")]
    gains = [p for p in model.parameters() if p.ndim == 1]
    no_decay: dict[str, Any] = {"params": gains, "weight_decay": 0.0}
    if args.optimizer == "muon":
        kind = torch.optim.Muon if bf16_is_fast(model.output.weight.device) else Float32Muon
        muon = kind(inner, lr=args.muon_lr or MUON_LR, momentum=0.95, weight_decay=0.05)
        return [
            muon,
            torch.optim.AdamW(
                [dict[str, Any](params=outer), no_decay], lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
            ),
        ]
    matrices: dict[str, Any] = {"params": inner + outer, "weight_decay": 0.05}
    return [torch.optim.AdamW([matrices, no_decay], lr=lr, betas=(0.9, 0.95), fused=fused)]


def load_codes(path: Path, vocab: int) -> Codes:
    """The content of ``codes.npz`` of ``parvis encode``. Raises InputError, OSError."""
    try:
        with naming(path), regular(path).open("rb") as file, np.load(file) as f:  # numpy leaves a damaged file open
            codes, labels, names = f["codes"], f["labels"], f["class_names"]
            texts = [str(name) for name in names.ravel()]  # fails for numbers that are no characters
    except (OSError, InputError):
        raise
    except Exception as error:  # numpy reads headers with Python's parser, which raises many kinds
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a file of parvis encode ({text}); encode the images again") from error
    whole = codes.dtype.kind in "iu" and labels.dtype.kind in "iu"  # labels of 0.9 or "1" would become classes
    if codes.ndim not in (3, 4) or not whole or not codes.size or labels.shape != codes.shape[:1]:
        raise InputError(
            f"{path}: has codes of shape {codes.shape} and type {codes.dtype}, labels of shape {labels.shape} and type "
            f"{labels.dtype}; expected whole numbers, codes [M,h,w] or [M,t,h,w] and labels [M], M of 1 or more; "
            "encode the images again"
        )
    if names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(
            f"{path}: has class_names of shape {names.shape} and type {names.dtype}; expected texts, one for each "
            "class; encode the images again"
        )
    if codes.min() < 0:
        raise InputError(f"{path}: has code {codes.min()}; expected 0 or more; encode the images again")
    if codes.max() >= vocab:
        raise InputError(
            f"{path}: has code {codes.max()}, --vocab {vocab} allows 0..{vocab - 1}; give the tokenizer's codebook size"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
        raise InputError(
            f"{path}: has labels {labels.min()}..{labels.max()} and {len(names)} class names; encode the images again"
        )
    return codes, labels.astype(np.int64), texts


@torch.no_grad()
def sample_sheet(model: PAR, tokenizer: Path, path: Path, guidance: float, rows: int = 4) -> None:
    """Write a PNG with ``rows`` images of each class (at most 16 classes), seeds 0, 1, ...; of clips, every other frame
    side by side, one clip of each class below the other.

    Raises CheckpointError, OSError.
    """
    columns = min(model.config.n_classes, 16)
    t, h, w = model.config.grid
    rows = rows if t == 1 else 1
    tokens = generate(model, [c for _ in range(rows) for c in range(columns)], guidance=guidance)
    raster = torch.empty_like(tokens)
    raster[:, torch.from_numpy(token_order(model.config)).to(tokens.device)] = tokens
    if t == 1:
        images = load_tokenizer(tokenizer).to(tokens.device).eval().decode(raster.view(-1, h, w)).clamp(-1, 1)
        grid = ((images + 1) * 127.5).unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # [rows,H,columns,W,3]
    else:
        clips = load_video_tokenizer(tokenizer).to(tokens.device).eval().decode(raster.view(-1, t, h, w)).clamp(0, 1)
        grid = (clips[:, :, ::2] * 255).permute(0, 3, 2, 4, 1)  # [columns,H,T',W,3]
    write_sheet(path, grid.flatten(2, 3).flatten(0, 1).to(torch.uint8).cpu().numpy())
