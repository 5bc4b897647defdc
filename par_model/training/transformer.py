"""Train a PAR model on encoded images: ``parvis train``.

The defaults are the paper's recipe (section 4.1): AdamW at a constant 1e-4 per 256 images, betas (0.9, 0.95),
weight decay 0.05 on matrices, clip 1.0, dropout 0.1, class dropout 0.1, bf16 autocast over fp32 weights.
``--optimizer muon --schedule cosine`` learns faster on a small budget; the demo model was trained with it.
"""

from __future__ import annotations

import argparse
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_model.checkpoint import open_checkpoint
from par_model.config import SIZES, PARConfig
from par_model.generation import generate
from par_model.ordering import token_order
from par_model.training.run import EMA, InputError, Run, batch_index, cosine, load_tokenizer, load_video_tokenizer
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
    codes, labels, names = load_codes(args.codes, args.vocab)
    held_out = load_codes(args.val, args.vocab)
    if held_out[0].shape[1:] != codes.shape[1:]:
        raise InputError(
            f"{args.val}: codes of {grid_text(held_out[0])}, {args.codes} has {grid_text(codes)}; encode "
            "both with the same tokenizer"
        )
    config = _config(args, grid_of(codes), len(names))
    with Run(args.run) as run:
        _train(args, config, run, (codes, labels, names), held_out)


def grid_of(codes: np.ndarray) -> tuple[int, int, int]:
    """The token grid (T, H, W) of ``codes`` [M,h,w] or [M,t,h,w]."""
    t, h, w = (1, *codes.shape[1:])[-3:]
    return t, h, w


def grid_text(codes: np.ndarray) -> str:
    """The grid of ``codes`` for a message."""
    return "x".join(map(str, codes.shape[1:]))


def _config(args: argparse.Namespace, grid: tuple[int, int, int], n_classes: int) -> PARConfig:
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
            dropout=args.dropout,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _train(args: argparse.Namespace, config: PARConfig, run: Run, data: Codes, held_out: Codes) -> None:
    codes, labels, names = data
    torch.manual_seed(args.seed)
    model = PAR(config)
    if args.init is not None:
        start_from(model, args.init)
    optimizers = make_optimizers(model, args)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    ema = EMA(model, args.ema)
    step = 0
    if (state := run.resume(args.resume)) is not None:
        model.load_state_dict(state["live"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.shadow, step = state["model"], state["step"]
        torch.set_rng_state(state["rng"])  # dropout is random
    order = token_order(config)

    def save() -> None:
        final = {"model": ema.shadow, "config": asdict(config) | {"kind": "par"}, "class_names": names}
        live = {"live": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        run.save("checkpoint.pt", final | live | {"step": step, "rng": torch.get_rng_state()})
        if step == args.steps:
            run.save("model.pt", final)

    total, counted = 0.0, 0
    while step < args.steps and not run.should_stop:
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for param_group, peak in zip(optimizer.param_groups, lrs, strict=True):
                decay = args.schedule == "cosine"
                param_group["lr"] = cosine(step, args.steps, peak, args.warmup, floor=0.0 if decay else 1.0)
        index = batch_index(args.seed, step, args.batch, len(codes))
        drop = np.random.default_rng((args.seed, step)).random(len(index)) < CLASS_DROPOUT
        tokens = torch.from_numpy(codes[index].reshape(len(index), -1)[:, order].astype(np.int64))
        classes = torch.from_numpy(np.where(drop, config.n_classes, labels[index]))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model, tokens, classes)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(model, step)
        total, counted, step = total + float(loss.detach()), counted + 1, step + 1
        if step % args.report == 0 or step == args.steps:
            averaged = PAR(config).eval()
            averaged.load_state_dict(ema.shadow)
            held = held_out_loss(averaged, held_out[0][:EVAL_IMAGES], held_out[1][:EVAL_IMAGES], args.batch)
            run.log(step=step, images=step * args.batch, loss=total / counted, held_out=held)
            total, counted = 0.0, 0
            save()
            if args.tokenizer and (step % args.sheet == 0 or step == args.steps):
                sample_sheet(averaged, args.tokenizer, run.path / f"sheet-{step:06d}.png", args.guidance)
    save()


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
    """Mean cross entropy (nats) over all N targets of ``tokens`` [B,N] in sequence order."""
    logits = model(tokens, labels)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


@torch.no_grad()
def held_out_loss(model: PAR, codes: np.ndarray, labels: np.ndarray, batch: int) -> float:
    """Mean cross entropy (nats per token) of held-out ``codes`` [M,h,w] or [M,t,h,w] with their ``labels`` [M]."""
    order, losses = token_order(model.config), []
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(codes), batch):
            tokens = codes[i : i + batch].reshape(-1, len(order))[:, order].astype(np.int64)
            classes = torch.from_numpy(labels[i : i + batch].astype(np.int64))
            losses.append(float(loss_of(model, torch.from_numpy(tokens), classes)) * len(tokens))
    return sum(losses) / len(codes)


def make_optimizers(model: PAR, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the matrices of the layers and AdamW for all other weights."""
    lr = args.lr if args.lr else 1e-4 * args.batch / 256
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    outer = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("layers.")]
    gains = [p for p in model.parameters() if p.ndim == 1]
    no_decay: dict[str, Any] = {"params": gains, "weight_decay": 0.0}
    if args.optimizer == "muon":
        muon = torch.optim.Muon(inner, lr=MUON_LR, momentum=0.95, weight_decay=0.05)
        return [
            muon,
            torch.optim.AdamW([dict[str, Any](params=outer), no_decay], lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
    matrices: dict[str, Any] = {"params": inner + outer, "weight_decay": 0.05}
    return [torch.optim.AdamW([matrices, no_decay], lr=lr, betas=(0.9, 0.95))]


def load_codes(path: Path, vocab: int) -> Codes:
    """The content of ``codes.npz`` of ``parvis encode``. Raises InputError, OSError."""
    try:
        with np.load(path) as f:
            codes, labels, names = f["codes"], f["labels"].astype(np.int64), [str(name) for name in f["class_names"]]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a file of parvis encode ({error}); encode the images again") from error
    if codes.max() >= vocab:
        raise InputError(
            f"{path}: has code {codes.max()}, --vocab {vocab} allows 0..{vocab - 1}; give the tokenizer's codebook size"
        )
    return codes, labels, names


@torch.no_grad()
def sample_sheet(model: PAR, tokenizer: Path, path: Path, guidance: float, rows: int = 4) -> None:
    """Write a PNG with ``rows`` images of each class (at most 16 classes), seeds 0, 1, ...; of clips, every other frame
    side by side, one clip of each class below the other.

    Raises CheckpointError, OSError.
    """
    from PIL import Image

    columns = min(model.config.n_classes, 16)
    t, h, w = model.config.grid
    rows = rows if t == 1 else 1
    tokens = generate(model, [c for _ in range(rows) for c in range(columns)], guidance=guidance)
    raster = torch.empty_like(tokens)
    raster[:, torch.from_numpy(token_order(model.config))] = tokens
    if t == 1:
        images = load_tokenizer(tokenizer).eval().decode(raster.view(-1, h, w)).clamp(-1, 1)
        grid = ((images + 1) * 127.5).unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)  # [rows,H,columns,W,3]
    else:
        clips = load_video_tokenizer(tokenizer).eval().decode(raster.view(-1, t, h, w)).clamp(0, 1)
        grid = (clips[:, :, ::2] * 255).permute(0, 3, 2, 4, 1)  # [columns,H,T',W,3]
    Image.fromarray(grid.flatten(2, 3).flatten(0, 1).to(torch.uint8).numpy()).save(path)
