"""Train a small VQ tokenizer on a folder of images: ``parvis train-tokenizer``.

Loss: L1, plus L1 of the image gradient (edges), plus L2, plus the VQ commitment terms; with ``--structure``, plus the
structural dissimilarity, which keeps detail of low contrast (``detail.py``). Codes that were not used since the last
check are set to encoder outputs, which keeps the whole codebook in use.

``--encoder-for`` trains only an encoder, for a codebook and a decoder that exist: models that were trained on these
codes stay valid, which they would not with a new codebook. ``--init`` trains all of a tokenizer further. Neither
restarts codes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from par_model.checkpoint import open_checkpoint, vq_config
from par_model.config import VQConfig
from par_model.training.data import ImageFolder
from par_model.training.detail import low_contrast, similarity
from par_model.training.device import (
    Batches,
    adamw,
    autocast,
    choose_device,
    copy_saved,
    load_optimizer,
    on_cpu,
    random_state,
    restore_random_state,
)
from par_model.training.files import InputError, keep_run_inputs
from par_model.training.resume import AGAIN
from par_model.training.run import (
    EMA,
    Run,
    batch_index,
    channels_last,
    cosine,
    write_sheet,
)
from par_model.vq import VQModel

COMMITMENT = 0.25  # weight of |z - stop(code)|^2 relative to |stop(z) - code|^2, the usual value
RESTART_EVERY = 100  # steps between checks for unused codes
ENCODER = ("encoder.", "quant_conv.")  # keys of the encoding half


def train(args: argparse.Namespace) -> None:
    """Run or resume the training that ``args`` of :func:`parser` describes.

    Raises InputError, CheckpointError, OSError.
    """
    data, held_out = ImageFolder.open(args.data, args.size), ImageFolder.open(args.val, args.size)
    keep_run_inputs(args.run, data=args.data, val=args.val, encoder_for=args.encoder_for, init=args.init)
    path = args.encoder_for or args.init
    if path is not None:
        given = open_checkpoint(path)
        config = vq_config(given)
        _check_size(config, data, held_out)
        device = choose_device(args.device)
        with Run(args.run, args.minutes) as run:
            _train(args, config, run, device, data, held_out, dict(given.tensors))
        return
    config = config_of(args)
    _check_size(config, data, held_out)
    device = choose_device(args.device)
    with Run(args.run, args.minutes) as run:
        _train(args, config, run, device, data, held_out)


def config_of(args: argparse.Namespace) -> VQConfig:
    """The tokenizer that the options ``args`` describe. Raises InputError for numbers that do not fit each other."""
    try:
        return VQConfig(
            codebook_size=args.codes,
            channels=args.channels,
            channel_multipliers=tuple(args.multipliers),
            res_blocks=args.res_blocks,
            z_channels=args.z_channels,
            norm_groups=args.norm_groups,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_size(config: VQConfig, *folders: ImageFolder) -> None:
    for folder in folders:
        if folder.size % config.downsampling:
            raise InputError(
                f"images of {folder.size} pixels a side; expected a multiple of {config.downsampling}, the pixels of a "
                "code"
            )


def _train(
    args: argparse.Namespace,
    config: VQConfig,
    run: Run,
    device: torch.device,
    data: ImageFolder,
    held_out: ImageFolder,
    given: dict[str, Tensor] | None = None,
) -> None:
    """``given``: the weights of a tokenizer, by key.

    With ``--encoder-for``, its codebook and decoder stay as they are, and a new encoder is trained; with ``--init``,
    all of it is trained further.
    """
    torch.manual_seed(args.seed)
    model = channels_last(VQModel(config).to(device))
    frozen = args.encoder_for is not None
    if given is not None:
        kept = {key: value for key, value in given.items() if not (frozen and key.startswith(ENCODER))}
        model.load_state_dict(kept, strict=False)  # vq_config checked every key
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and key in kept))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trained, args.lr, device)
    ema = EMA(model, 0.999)
    usage = torch.zeros(config.codebook_size, device=device)
    step = 0
    about = asdict(config) | {"kind": "vq"}
    with run.resume(args.resume, about) as state:
        if state is not None:
            check_half(run.path, state, len(trained))
            model.load_state_dict(state["live"])
            load_optimizer(optimizer, state["optimizer"])
            ema.load(state["model"])
            copy_saved(usage, state["usage"])
            step = state["step"]
            restore_random_state(state["rng"], device)  # restarted codes are random
    batches = Batches(data, device)

    def save() -> None:
        final = {"model": ema.shadow, "config": about}
        live = {"live": model.state_dict(), "optimizer": optimizer.state_dict()}
        place = {"step": step, "usage": usage, "rng": random_state(device)}
        run.save("checkpoint.pt", on_cpu(final | live | place))
        if done:
            run.save("model.pt", on_cpu(final))

    done = run.done(step, args.steps)
    while not done and not run.should_stop:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.lr, warmup=100, share=run.share)
        x = batches.batch(batch_index(args.seed, step, args.batch, len(data)))
        parts, z, ids = update(model, x.to(memory_format=torch.channels_last), optimizer, args.structure)
        ema.update(model, step)
        count_codes(usage, ids)
        step += 1
        if given is None and step % RESTART_EVERY == 0 and step < args.steps // 2 and run.share < 0.5:
            restarted = restart_dead_codes(model, usage, z)
            usage.zero_()
            if restarted:
                ema.shadow["quantize.embedding.weight"].copy_(model.quantize.embedding.weight.detach())
        done = run.done(step, args.steps)
        if step % args.report == 0 or done:
            save()  # first: a held-out picture, log or sheet that fails must not lose the steps
            row: dict[str, Any] = {k: float(v) for k, v in parts.items()}
            measured, sheet = validate(config, ema, held_out)
            run.log(step=step, images=step * args.batch, **row, **measured)
            write_sheet(run.path / "sheet.png", sheet)
    save()


def check_half(run: Path, state: dict[str, Any], trained: int) -> None:
    """Raise InputError where a run trained another part of a tokenizer than the ``trained`` tensors."""
    before = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    if before != trained:
        was, now = ("with", "without") if before < trained else ("without", "with")
        raise InputError(f"--resume: the run in {run} was trained {was} --encoder-for, given now: {now}; {AGAIN}")


def update(
    model: VQModel, x: Tensor, optimizer: torch.optim.Optimizer, structure: float = 0.0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One update of the weights by images ``x`` [B,3,H,W] on the model's device; ``structure``: see ``reconstruct``.

    Returns the parts of the loss, the encoder outputs [B*h*w,codebook_dim] and ids [B*h*w]; they stay on the device,
    and nothing waits for them.
    """
    with autocast(x.device):
        loss, parts, z, ids = reconstruct(model, x, structure)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return {name: value.detach() for name, value in parts.items()}, z.detach(), ids


def count_codes(usage: Tensor, ids: Tensor) -> None:
    """Add to ``usage`` [V] how often each code is in ``ids`` [M]."""
    usage.index_add_(0, ids, torch.ones_like(ids, dtype=usage.dtype))


def reconstruct(model: VQModel, x: Tensor, structure: float = 0.0) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss, its parts, encoder outputs [B*h*w,codebook_dim] and ids [B*h*w] of images [B,3,H,W].

    ``structure``: weight of the structural dissimilarity in the loss.
    """
    z = model.quant_conv(model.encoder(x)).float()
    with autocast(x.device, enabled=False):
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        codebook = F.normalize(model.quantize.embedding.weight, dim=-1)
        with torch.no_grad():
            ids = (z.reshape(-1, z.shape[-1]) @ codebook.T).argmax(1)
        code = F.embedding(ids, codebook).reshape(z.shape)
        vq = ((z.detach() - code) ** 2).sum(-1).mean() + COMMITMENT * ((z - code.detach()) ** 2).sum(-1).mean()
        straight = z + (code - z).detach()  # straight-through: the encoder gets the gradients of its own outputs
    y = model.decode_codes(straight.permute(0, 3, 1, 2)).float()
    l1 = (y - x).abs().mean()
    edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
    l2 = ((y - x) ** 2).mean()
    loss = l1 + edges + l2 + 0.5 * vq
    parts = {"l1": l1, "edges": edges, "mse": l2, "vq": vq}
    if structure:
        with autocast(x.device, enabled=False):
            parts["structure"] = 1 - similarity(x, y).mean()
        loss = loss + structure * parts["structure"]
    return loss, parts, z.reshape(-1, z.shape[-1]), ids


@torch.no_grad()
def restart_dead_codes(model: VQModel, usage: Tensor, z: Tensor) -> int:
    """Set the codes that ``usage`` [V] counts 0 times to random rows of the encoder outputs ``z`` [M,codebook_dim].

    Returns how many.
    """
    dead = (usage == 0).nonzero().flatten()
    if len(dead):
        pick = torch.randint(len(z), (len(dead),)).to(z.device)  # drawn on the CPU, for the same numbers anywhere
        weight = model.quantize.embedding.weight
        weight[dead] = z[pick] + 0.01 * torch.randn(len(dead), z.shape[1]).to(z.device)
        alive = usage > 0
        weight[alive] = F.normalize(weight[alive], dim=-1)
    return len(dead)


@torch.no_grad()
def validate(
    config: VQConfig, ema: EMA, held_out: ImageFolder, count: int = 256
) -> tuple[dict[str, float], np.ndarray]:
    """PSNR (dB), the share of low-contrast detail that is kept and the share of codes in use on ``count`` held-out
    images, with the averaged weights; and a sheet of the first images and their reconstructions, uint8 [H,W,3].
    """
    device = next(iter(ema.shadow.values())).device
    model = VQModel(config).to(device)
    model.load_state_dict(ema.shadow)
    channels_last(model).eval()
    count = min(count, len(held_out))
    squared, used, rows, detail = 0.0, set(), [], torch.zeros(2, device=device)
    with autocast(device):
        for start in range(0, count, 64):
            x = held_out.batch(np.arange(start, min(start + 64, count))).to(device)
            ids = model.encode(x.to(memory_format=torch.channels_last))
            y = model.decode(ids).float().clamp(-1, 1)
            squared += float(((y - x) ** 2).mean(dim=(1, 2, 3)).sum())
            used.update(ids.flatten().tolist())
            with autocast(device, enabled=False):
                detail += low_contrast(x, y)
            if start == 0:
                pairs = torch.stack([x[:24], y[:24]], 1)  # [24, 2, 3, H, W]: original above, reconstruction below
                wide = min(12, len(pairs))
                starts = range(0, len(pairs) - wide + 1, wide)
                rows = [pairs[i : i + wide].permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2) for i in starts]
    pixels = ((torch.cat(rows).clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu().numpy()
    mse = squared / count / 4  # images span 2, so the peak squared is 4
    return {
        "psnr_db": float(-10 * np.log10(mse)),
        "low_contrast_kept": float(detail[0] / detail[1].clamp_min(1e-9)),
        "codes_used": len(used) / config.codebook_size,
    }, pixels
